"""What every cell is asked: 73 sequences in waves of 1, 8 and 64 that share prefixes."""

from __future__ import annotations

import random

from fluxmoe.backends.vllm.child.child import Prompt

#: Tokens of one step: fewer than the first prompt has where prefill is chunked.
CHUNK = 96
LONG = 150
BLOCK = 32

#: Of every engine; stock gets as many bytes of KV cache as FluxMoE does.
KV_BYTES = 32 << 20
OPTIONS = {"max_model_len": 256, "max_num_seqs": 64, "block_size": BLOCK}


def options(mode: str, prefix_caching: bool, chunked_prefill: bool) -> dict[str, object]:
    """vLLM's settings of a cell."""
    return {
        **OPTIONS,
        "enforce_eager": mode != "vllm compiled",
        "enable_prefix_caching": prefix_caching,
        "enable_chunked_prefill": chunked_prefill,
        "max_num_batched_tokens": CHUNK if chunked_prefill else 16384,
    }


def waves(vocabulary: int, *, seeded: bool) -> list[list[Prompt]]:
    """The requests; a wave is sent when the one before has been answered.

    The first is one long prompt, whose prefixes later ones share: they find them in the prefix
    cache. In the others every second prompt is of its own, of 1 to 40 tokens.

    Args:
        vocabulary: Prompts consist of tokens below it.
        seeded: Every second request samples with a seed of its own; else all are greedy, which
            chunked prefill needs (vLLM on a CPU cannot split the prefill of a seeded request).
    """
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, min(vocabulary, 1000)) for _ in range(count)]

    base = tokens(LONG)
    result = [[Prompt(base, 12, logprobs=True)]]
    for size in (8, 64):
        wave = []
        for index in range(size):
            shared = base[: BLOCK * rng.randint(1, 3)] if index % 4 < 2 else []
            sampled = seeded and index % 2 == 1
            wave.append(
                Prompt(
                    shared + tokens(rng.randint(1, 40)),
                    rng.randint(10, 20),
                    temperature=1.0 if sampled else 0.0,
                    seed=index,
                    logprobs=True,
                )
            )
        result.append(wave)
    return result
