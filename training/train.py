"""Train the shipped model in two processes that share their weights.

    python training/train.py --data FOLDER --run FOLDER --minutes 26 --decay 8
    python training/train.py --data FOLDER --run FOLDER --minutes 48 --decay 28 \
        --resume OTHER/stable.pt

After a short warm-up, the learning rate is constant until the last ``--decay`` minutes and then
decays linearly to zero. ``stable.pt`` is written when the decay begins, so that a longer run can
continue from there.

Each process uses one thread, because for matrix products this small, waking threads costs more
than it gains. The parameters are in memory that both processes share. Each process computes the
gradient of its half of the batch and, after a barrier, updates its half of the parameters with the
mean of both gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network import Network
from torch import Tensor
from torch import multiprocessing as mp
from torch.nn import functional as F

WORKERS = 2
#: Sequences per process and step, and their length in bytes.
BATCH, LENGTH = 12, 256
#: Weights of the losses that keep each layer's router balanced and its logits small.
BALANCE, Z = 0.12, 1e-4
#: Learning rates: of Muon (matrices) and of Adam (embedding, routers, norms).
MUON, ADAM = 0.02, 0.003
WEIGHT_DECAY = 0.02
WARMUP_STEPS = 40
#: Interval in steps, and coefficient, of the updates of the parameters' running mean, which can be
#: used before the learning rate decays.
AVERAGE_EVERY, AVERAGE = 4, 0.04
SETTINGS = {
    "vocab_size": 259,
    "hidden_size": 160,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def token_ids() -> np.ndarray:
    """Map each byte to its token id; the NUL between documents becomes ``<eos>``."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    index = {char: i + 3 for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    table = np.array([index[letter[byte]] for byte in range(256)], dtype=np.int64)
    table[0] = SETTINGS["eos_token_id"]
    return table


def load(data: Path, part: str) -> np.ndarray:
    """Load all text of one part as token ids (uint16)."""
    texts = [path.read_bytes() for path in sorted(data.glob(f"{part}-*.txt"))]
    joined = np.frombuffer(b"\0".join(texts), dtype=np.uint8)
    return token_ids().astype(np.uint16)[joined]


def orthogonal(g: Tensor) -> Tensor:
    """Approximate the semi-orthogonal matrices nearest to ``g`` [..., r, c] by Newton-Schulz."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


class Optimizer:
    """Muon for matrices, Adam for the rest, on the parameters of one process."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.named = named
        self.state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in named.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], scale: float) -> None:
        self.steps += 1
        for name, p in self.named.items():
            g, (m, v) = grads[name], self.state[name]
            if p.ndim < 2 or name == "embed" or name.endswith("router"):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.02)
                step = m / (1 - 0.9**self.steps)
                p.sub_(scale * ADAM * step / ((v / (1 - 0.98**self.steps)).sqrt() + 1e-10))
                continue
            m.mul_(0.95).add_(g)
            u = g + 0.95 * m
            if name.endswith("gate_up"):  # two stacked matrices
                u = orthogonal(u.view(-1, u.shape[1] // 2, u.shape[2])).view_as(u)
                rows = u.shape[1] // 2
            else:
                u, rows = orthogonal(u), u.shape[-2]
            lr = scale * MUON * max(1.0, rows / u.shape[-1]) ** 0.5
            p.mul_(1 - scale * MUON * WEIGHT_DECAY).sub_(lr * u)


def shares(model: Network) -> list[list[str]]:
    """Assign parameters to processes, with about equal work for each."""
    out: list[list[str]] = [[] for _ in range(WORKERS)]
    sizes = [0] * WORKERS
    for name, p in sorted(model.named_parameters(), key=lambda pair: -pair[1].numel()):
        least = sizes.index(min(sizes))
        out[least].append(name)
        sizes[least] += p.numel()
    return out


@torch.no_grad()
def bits_per_byte(model: Network, tokens: np.ndarray, windows: int, length: int) -> float:
    """Compute the mean bits per byte over evenly spaced windows, each without preceding text."""
    model.eval()
    torch.compiler.set_stance("force_eager")
    starts = np.linspace(0, len(tokens) - length - 1, windows).astype(int)
    total = 0.0
    for chunk in np.array_split(starts, max(1, windows // 16)):
        ids = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in chunk]).astype(int))
        logits = model(ids[:, :-1], torch.bfloat16)[0]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    model.train()
    return total / (windows * length) / math.log(2)


def work(rank: int, model: Network, grads: Any, clock: Tensor, barrier: Any, args: Any) -> None:
    torch.set_num_threads(1)
    train, held = load(args.data, "train"), load(args.data, "held")
    mine = shares(model)[rank]
    named = dict(model.named_parameters())
    optimizer = Optimizer({name: named[name] for name in mine})
    steps = seen = 0
    if args.resume:
        saved = torch.load(args.resume.with_suffix(f".{rank}.pt"))
        optimizer.state, optimizer.steps = saved["state"], saved["steps"]
        steps, seen = saved["steps"], saved["seen"]
    model.train()
    for layer in model.layers:
        layer.compile(dynamic=False)  # one compiled function serves all layers
    averaged = {name: named[name].detach().clone() for name in mine}
    rng = np.random.default_rng([rank, steps])
    for name, p in named.items():
        p.grad = grads[rank][name]

    def save(label: str) -> None:
        state = {"state": optimizer.state, "steps": steps, "seen": seen, "averaged": averaged}
        torch.save(state, args.run / f"{label}.{rank}.pt")
        if rank == 0:
            torch.save(model.state_dict(), args.run / f"{label}.pt")

    began, saved_at, stable, history = time.time(), time.time(), False, []
    while True:
        if rank == 0:
            clock[0] = (time.time() - began) / 60
        barrier.wait()
        now = float(clock[0])
        if now >= args.minutes:
            break
        scale = min(1.0, (args.minutes - now) / args.decay, (steps + 1) / WARMUP_STEPS)
        if not stable and now >= args.minutes - args.decay:
            stable = True
            save("stable")
        length = 4 * LENGTH if now >= args.minutes - args.long else LENGTH
        starts = rng.integers(0, len(train) - length - 1, BATCH * LENGTH // length)
        torch.compiler.set_stance("default" if length == LENGTH else "force_eager")
        ids = torch.from_numpy(np.stack([train[s : s + length + 1] for s in starts]).astype(int))
        logits, balance, z, loads = model(ids[:, :-1], torch.bfloat16)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + BALANCE * balance + Z * z).backward()
        barrier.wait()
        both = {name: sum(g[name] for g in grads) / WORKERS for name in mine}
        optimizer.step(both, scale)
        for name in mine:
            for g in grads:
                g[name].zero_()
        if steps % AVERAGE_EVERY == 0:
            for name, mean in averaged.items():
                mean.lerp_(named[name].detach(), AVERAGE)
        steps += 1
        seen += WORKERS * BATCH * LENGTH
        if rank == 0:
            history.append(loss.item() / math.log(2))
            if steps % 50 == 0 or steps == 5:
                skew = (loads.max(1).values / loads.float().mean(1)).tolist()
                row = {
                    "step": steps,
                    "bytes": seen,
                    "minutes": round(now, 2),
                    "rate": round(scale, 4),
                    "train_bits_per_byte": round(sum(history) / len(history), 4),
                    "max_over_mean_load": [round(value, 2) for value in skew],
                }
                history.clear()
                if steps % 250 == 0:
                    row["held_bits_per_byte"] = round(bits_per_byte(model, held, 64, 256), 4)
                with (args.run / "log.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if now - (saved_at - began) / 60 > 4:
            saved_at = time.time()
            save("latest")
    save("final")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py made")
    parser.add_argument("--run", type=Path, required=True, help="folder for log and states")
    parser.add_argument("--minutes", type=float, required=True, help="wall time of the run")
    parser.add_argument("--decay", type=float, required=True, help="minutes with decaying rate")
    parser.add_argument("--long", type=float, default=2.0, help="last minutes with long sequences")
    parser.add_argument("--resume", type=Path, help="a state of an earlier run")
    args = parser.parse_args()
    from transformers import Qwen3MoeConfig

    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Network(Qwen3MoeConfig(**SETTINGS))
    if args.resume:
        model.load_state_dict(torch.load(args.resume))
    model.share_memory()
    grads = [
        {n: torch.zeros_like(p).share_memory_() for n, p in model.named_parameters()}
        for _ in range(WORKERS)
    ]
    clock = torch.zeros(1).share_memory_()
    barrier = mp.get_context("spawn").Barrier(WORKERS)
    mp.spawn(work, (model, grads, clock, barrier, args), nprocs=WORKERS)


if __name__ == "__main__":
    main()
