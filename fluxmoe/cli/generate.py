"""``fluxmoe generate``: run one prompt through a paged model and show the cost of paging."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import models, output
from fluxmoe.cli.shared.options import AsJson, Plugins
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.config import Config
    from fluxmoe.plugins import Registry


class Backend(StrEnum):
    """The engine that runs the model."""

    TORCH = "torch"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class _Task:
    """A request to either backend; ``settings`` is a configuration."""

    model: str
    prompt: list[int]
    max_new_tokens: int
    settings: dict[str, Any]
    config: Config
    registry: Registry


@dataclass(frozen=True, slots=True)
class _Answer:
    """A backend's answer; ``stats`` comes from ``Runtime.stats``."""

    tokens: list[int]
    seconds: float
    stats: dict[str, Any]


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face checkpoint: folder or name.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,3", help="Token ids instead of text, for models without a tokenizer."
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(metavar="|".join(Backend), help="Engine that runs the model.")
    ] = Backend.TORCH,
    memory: Annotated[
        str,
        typer.Option(help="Memory for expert pages, such as 2GiB; vllm: and the KV cache."),
    ] = "4GiB",
    eviction: Annotated[str, typer.Option(help="Eviction policy.")] = "next-use",
    prefetch: Annotated[str, typer.Option(help="Prefetch policy.")] = "none",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Continue one prompt with greedy decoding; print the text and statistics."""
    if (prompt is None) == (prompt_ids is None):
        raise ConfigError("one of --prompt and --prompt-ids is needed")
    given = None if prompt_ids is None else models.numbers(prompt_ids, "--prompt-ids")

    from fluxmoe import config, plugins

    settings = {
        "memory": {"budget": memory},
        "eviction": eviction,
        "prefetch": prefetch,
        "plugins": plugin or [],
    }
    # Raises configuration errors before the model is loaded.
    parsed = config.parse(settings, where="fluxmoe generate")
    registry = plugins.load(parsed.plugins)
    registry.check(parsed)
    models.quiet()
    vocabulary = models.config(model).get_text_config().vocab_size
    tokenizer = models.tokenizer(model, required=given is None)
    ids = given if given is not None else models.encode(tokenizer, prompt or "")
    if not ids or not all(0 <= token < vocabulary for token in ids):
        raise ConfigError(
            f"invalid prompt tokens: {ids}",
            where="--prompt" if given is None else "--prompt-ids",
            fix=f"give at least one token, each within 0…{vocabulary - 1}",
        )
    task = _Task(model, ids, max_new_tokens, settings, parsed, registry)
    answer = _torch(task) if backend is Backend.TORCH else _vllm(task)
    tokens = answer.tokens
    result = {
        "model": model,
        "backend": str(backend),
        "prompt_ids": ids,
        "token_ids": tokens,
        "text": tokenizer and tokenizer.decode(tokens, skip_special_tokens=True),
        "seconds": answer.seconds,
        "tokens_per_s": len(tokens) / answer.seconds,
        "stats": answer.stats,
    }
    if as_json:
        output.print_json(result)
    else:
        _print(result, prompt)


def _torch(task: _Task) -> _Answer:
    import torch

    from fluxmoe.backends.torch.loader import load_configured

    with (
        load_configured(task.model, task.config, task.registry) as paged,
        torch.inference_mode(),
    ):
        started = time.perf_counter()
        tokens = paged.model.generate(
            torch.tensor([task.prompt]),
            attention_mask=torch.ones(1, len(task.prompt), dtype=torch.int64),
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            pad_token_id=0,  # one sequence is never padded; avoids a warning of transformers
        )[0, len(task.prompt) :].tolist()
        return _Answer(tokens, time.perf_counter() - started, paged.stats())


def _vllm(task: _Task) -> _Answer:
    import torch

    from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt

    engine = ChildEngine(
        task.model,
        fluxmoe=task.settings,
        threads=torch.get_num_threads(),
        enforce_eager=True,  # compiling takes longer than one prompt
        max_model_len=len(task.prompt) + task.max_new_tokens,
        max_num_seqs=1,
        block_size=32,
    )
    with engine:
        prompt = Prompt(task.prompt, task.max_new_tokens, stop=models.stop_tokens(task.model))
        run = engine.generate([prompt])
    return _Answer(run.tokens[0], run.seconds, run.stats)


def _print(result: dict[str, Any], prompt: str | None) -> None:
    stats = result["stats"]
    if result["text"] is None:
        print(",".join(map(str, result["token_ids"])))
    else:
        print((prompt or "") + result["text"])
    output.say(
        f"{len(result['token_ids'])} tokens, {result['tokens_per_s']:.1f} per second; experts: "
        f"{stats['slots']} of {stats['pages']} pages fit in {sizes.shown(stats['expert_bytes'])}"
        f", hit rate {stats['hit_rate']:.1%}, {sizes.shown(stats['bytes_demand'])} loaded on "
        f"demand, {sizes.shown(stats['bytes_prefetch'])} ahead, {stats['stall_seconds']:.2f} s "
        "waited",
        style="dim",
    )
