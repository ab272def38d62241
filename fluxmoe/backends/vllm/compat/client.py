"""The engine as vLLM's server sees it."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams


async def collective_rpc(client: Any, method: str, argument: object) -> list[Any]:
    """Call a method of all workers; their answers."""
    answers: list[Any] = await client.collective_rpc(method, args=(argument,))
    return answers


def is_idle(client: Any) -> bool:
    """Whether no request is in flight."""
    return not client.output_processor.has_unfinished_requests()


async def run_a_step(client: Any, name: str) -> None:
    """Have an idle engine take a few steps: a request for two tokens, whose answer nobody reads."""
    params = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    async for _ in client.generate({"prompt_token_ids": [0]}, params, name):
        pass
