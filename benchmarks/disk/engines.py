"""The engines that are compared. Each runs in a process of its own: ``… engines NAME ARGUMENTS``.

The process prints one line of JSON: seconds until the model was ready, the time of each step after
the first token, bytes read from disks in these steps, and what FluxMoE counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Tokens of a prompt, and the distance between the first tokens of two prompts.
PROMPT, APART = 16, 31


@dataclass(frozen=True)
class Task:
    """What an engine computes.

    Attributes:
        model: Folder of the checkpoint.
        files: Folder with the other formats of the model, and FluxMoE's page files.
        memory: Bytes for experts and KV cache; the peers use the page cache instead.
        batch: Number of prompts.
        new: Number of tokens per prompt.
        peers: Folder with the packages of the peers.
    """

    model: str
    files: str
    memory: int
    batch: int
    new: int
    peers: str

    def prompts(self) -> list[list[int]]:
        return [[APART * row + i for i in range(PROMPT)] for row in range(self.batch)]


#: A contestant: yields None when it is ready, and then the tokens of each step.
Run = Iterator[list[int] | None]


def fluxmoe_vllm(task: Task, found: dict[str, Any]) -> Run:
    from vllm import LLM, SamplingParams

    from fluxmoe.backends.vllm import engine_options

    kv = 32 << 20
    config = {
        "memory": {"budget": task.memory, "kv": {"target": kv, "max": kv}},
        "stores": [{"kind": "file", "path": f"{task.files}/vllm"}],
    }
    llm = LLM(
        task.model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=task.batch,
        block_size=32,
        **engine_options(config),
    )
    yield None
    parameters = SamplingParams(
        max_tokens=task.new, temperature=0, ignore_eos=True, detokenize=False
    )
    engine = llm.llm_engine
    for row, prompt in enumerate(task.prompts()):
        engine.add_request(str(row), {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        made = [list(out.outputs[0].token_ids)[-1] for out in engine.step()]
        found["stats"] = lambda: llm.collective_rpc("fluxmoe_stats")[0]
        yield made


def fluxmoe_torch(task: Task, found: dict[str, Any]) -> Run:
    import fluxmoe

    stores = [{"kind": "file", "path": f"{task.files}/torch"}]
    paged = fluxmoe.load(task.model, task.memory - (32 << 20), stores=stores)
    found["stats"] = paged.stats
    yield None
    yield from _generate(paged.model, task)


def transformers_accelerate(task: Task, found: dict[str, Any]) -> Run:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": task.memory},
        offload_folder=f"{task.files}/accelerate",
    )
    yield None
    yield from _generate(model, task)


def transformers_mmap(task: Task, found: dict[str, Any]) -> Run:
    import torch
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(task.model)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for file in sorted(Path(task.model).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if ".experts." not in name:
                    owner, _, leaf = name.rpartition(".")
                    value = torch.nn.Parameter(weights.get_tensor(name).clone(), False)
                    setattr(model.get_submodule(owner), leaf, value)
    path = Path(task.files, "stacked.bin")
    flat = torch.from_file(
        str(path), shared=True, size=path.stat().st_size // 2, dtype=torch.bfloat16
    )
    at = 0
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            for name in ("gate_up_proj", "down_proj"):
                shape = getattr(module, name).shape
                weight = flat[at : at + shape.numel()].view(shape)
                setattr(module, name, torch.nn.Parameter(weight, False))
                at += shape.numel()
    model.eval()
    yield None
    yield from _generate(model, task)


def llama_cpp(task: Task, found: dict[str, Any]) -> Run:
    import numpy as np
    from llama_cpp_py_sync import _cffi_bindings as bindings

    lib, ffi = bindings.get_lib(), bindings.get_ffi()
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = False  # repacked weights would not be pages of the file
    file = Path(task.files, "model.gguf")
    model = lib.llama_model_load_from_file(str(file).encode(), options)
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = 256 * task.batch, task.batch
    settings.n_threads = settings.n_threads_batch = 1
    context = lib.llama_init_from_model(model, settings)
    assert ffi.NULL not in (model, context)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether its next token is wanted)."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        assert lib.llama_decode(context, batch) == 0
        rows = [lib.llama_get_logits_ith(context, i) for i, each in enumerate(tokens) if each[3]]
        made = [int(np.frombuffer(ffi.buffer(row, 4 * size), np.float32).argmax()) for row in rows]
        lib.llama_batch_free(batch)
        return made

    yield None
    made = decode(
        [
            (token, i, row, i == PROMPT - 1)
            for row, prompt in enumerate(task.prompts())
            for i, token in enumerate(prompt)
        ]
    )
    yield made
    for step in range(task.new - 1):
        made = decode([(token, PROMPT + step, row, True) for row, token in enumerate(made)])
        yield made


def _generate(model: Any, task: Task) -> Run:
    """Decode greedily with ``transformers``, step by step."""
    import torch

    ids, past = torch.tensor(task.prompts()), None
    with torch.inference_mode():
        for _ in range(task.new):
            out = model(ids, past_key_values=past, use_cache=True)
            ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield ids[:, 0].tolist()


ENGINES: dict[str, Callable[[Task, dict[str, Any]], Run]] = {
    "FluxMoE in vLLM": fluxmoe_vllm,
    "FluxMoE in torch": fluxmoe_torch,
    "llama.cpp, mmap": llama_cpp,
    "transformers, mmap": transformers_mmap,
    "transformers, accelerate": transformers_accelerate,
}


def main() -> None:
    task = Task(**json.loads(sys.argv[2]))
    sys.path.append(task.peers)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    started = time.perf_counter()
    run = ENGINES[sys.argv[1]](task, found)
    next(run)
    loaded = time.perf_counter()
    tokens, ends, before, read = [], [], {}, 0
    for made in run:
        if made:
            tokens.append(made)
            ends.append(time.perf_counter())
        if len(tokens) == 1:
            before, read = found.get("stats", dict)(), _read_bytes()
    after = found.get("stats", dict)()
    counted = ("hits", "misses", "bytes_demand", "bytes_prefetch", "stall_seconds", "disk_bytes")
    row = {
        "load_seconds": loaded - started,
        "first_seconds": ends[0] - loaded,
        "seconds": ends[-1] - ends[0],
        "tokens": task.batch * (len(ends) - 1),
        "read_bytes": _read_bytes() - read,
        "right": all(
            token == (prompt[-1] + 1 + step) for step, made in enumerate(tokens)
            for token, prompt in zip(made, task.prompts(), strict=True)
        ),
        **{name: after[name] - before[name] for name in counted if name in after},
    }  # fmt: skip
    print("RESULT", json.dumps(row), flush=True)
    os._exit(0)  # engines that are still loaded are not worth an orderly end


def _read_bytes() -> int:
    """Return the bytes that this process has read from disks."""
    lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    main()
