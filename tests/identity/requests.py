"""The requests of each cell: 73 sequences in waves of 1, 8 and 64 that share prefixes."""

from __future__ import annotations

import random

from fluxmoe.backends.vllm.child.child import Prompt

#: Tokens per step with chunked prefill: fewer than the first prompt has.
CHUNK = 96
LONG = 150
BLOCK = 32

#: KV cache of every engine, in bytes; the same for stock and FluxMoE.
KV_BYTES = 32 << 20
OPTIONS = {"max_model_len": 256, "max_num_seqs": 64, "block_size": BLOCK}


def options(mode: str, prefix_caching: bool, chunked_prefill: bool) -> dict[str, object]:
    """Make a cell's settings for vLLM."""
    return {
        **OPTIONS,
        "enforce_eager": mode != "vllm compiled",
        "enable_prefix_caching": prefix_caching,
        "enable_chunked_prefill": chunked_prefill,
        "max_num_batched_tokens": CHUNK if chunked_prefill else 16384,
    }


def waves(vocabulary: int, *, seeded: bool) -> list[list[Prompt]]:
    """Make the requests; each wave is sent after the previous one has been answered.

    The first wave is one long prompt, whose prefixes later prompts share and find in the prefix
    cache. In the other waves, half of the prompts are independent, with 1 to 40 tokens.

    Args:
        vocabulary: Upper bound of the prompts' tokens.
        seeded: True if every second request samples with its own seed. Otherwise, all requests are
            greedy, as needed for chunked prefill (vLLM on a CPU cannot split the prefill of a
            seeded request).
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
