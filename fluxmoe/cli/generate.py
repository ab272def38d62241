"""``fluxmoe generate``: run a prompt through a paged model and show the cost of paging."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import models, output
from fluxmoe.cli.shared.options import AsJson, Plugins, Store, stores
from fluxmoe.errors import ConfigError

if TYPE_CHECKING:
    from fluxmoe.findings import Findings

_WHERE = "fluxmoe generate"


class Backend(StrEnum):
    """The engine that runs the model."""

    TORCH = "torch"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class _Answer:
    """A backend's answer; ``stats`` is the result of ``Runtime.stats``."""

    tokens: list[int]
    seconds: float
    stats: dict[str, Any]


#: Function that starts an engine and continues a prompt by a number of tokens.
_Engine: TypeAlias = Callable[[list[int], int], _Answer]


def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a folder or a name.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_ids: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,3", help="Token ids to continue, for models without a tokenizer."
        ),
    ] = None,
    backend: Annotated[
        Backend, typer.Option(metavar="|".join(Backend), help="Engine that runs the model.")
    ] = Backend.TORCH,
    memory: Annotated[
        str,
        typer.Option(
            help="Memory for expert pages, such as 2GiB; with vllm, also for the KV cache."
        ),
    ] = "4GiB",
    eviction: Annotated[str, typer.Option(help="Eviction policy.")] = "next-use",
    prefetch: Annotated[str, typer.Option(help="Prefetch policy.")] = "none",
    store: Store = "host",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 64,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with greedy decoding, and print the text and statistics."""
    from fluxmoe.findings import Findings

    found, given = Findings(), None
    if (prompt is None) == (prompt_ids is None):
        found.errors.append(ConfigError("exactly one of --prompt and --prompt-ids is needed"))
    elif prompt_ids is not None:
        given = found.result(models.numbers, prompt_ids, "--prompt-ids")
    size = models.setting(model, "vocab_size")
    if given is not None and size is not None:
        with found.check():
            models.require_tokens(given, size, "--prompt-ids")
    with found.check():
        models.require_length(model, len(given or [0]) + max_new_tokens)
    settings = {
        "memory": {"budget": memory},
        "eviction": eviction,
        "prefetch": prefetch,
        "plugins": plugin or [],
        "stores": found.result(stores, store) or [{"kind": "host"}],
    }
    start = _torch if backend is Backend.TORCH else _vllm
    engine = start(model, settings, found, len(given or [0]) + max_new_tokens)
    found.require()
    for note in found.notes:
        output.warn(note)
    models.quiet()
    tokenizer = models.tokenizer(model, required=given is None)
    ids = given if given is not None else models.encode(tokenizer, prompt or "")
    size = size or models.config(model).get_text_config().vocab_size
    models.require_tokens(ids, size, "--prompt" if given is None else "--prompt-ids")
    models.require_length(model, len(ids) + max_new_tokens)
    answer = engine(ids, max_new_tokens)
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


def _torch(model: str, settings: dict[str, Any], found: Findings, _: int) -> _Engine:
    """Check all that can be checked without the engine; return the function that starts it."""
    from fluxmoe import config
    from fluxmoe.backends.torch import loader

    parsed = config.parse_most(settings, found, where=_WHERE)
    ready = loader.prepare(model, parsed, found, where=_WHERE)

    def run(prompt: list[int], max_new_tokens: int) -> _Answer:
        import torch

        assert ready is not None  # otherwise an error was found
        with ready.load() as paged, torch.inference_mode():
            started = time.perf_counter()
            tokens = paged.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,  # avoids a warning from transformers; one sequence is never padded
            )[0, len(prompt) :].tolist()
            return _Answer(tokens, time.perf_counter() - started, paged.stats())

    return run


def _vllm(model: str, settings: dict[str, Any], found: Findings, least: int) -> _Engine:
    """Do the same for vLLM.

    The model must accept requests of ``least`` tokens.
    """
    from fluxmoe.backends.vllm.child import child

    options: dict[str, Any] = {
        "enforce_eager": True,  # compiling takes longer than one prompt
        "max_num_seqs": 1,
        "block_size": 32,
    }
    child.examine(model, settings, found, where=_WHERE, max_model_len=least, **options)

    def run(prompt: list[int], max_new_tokens: int) -> _Answer:
        import torch

        with child.ChildEngine(
            model,
            fluxmoe=settings,
            threads=torch.get_num_threads(),
            max_model_len=len(prompt) + max_new_tokens,
            **options,
        ) as engine:
            asked = child.Prompt(prompt, max_new_tokens, stop=models.stop_tokens(model))
            done = engine.generate([asked])
        return _Answer(done.tokens[0], done.seconds, done.stats)

    return run


def _print(result: dict[str, Any], prompt: str | None) -> None:
    stats = result["stats"]
    if result["text"] is None:
        print(",".join(map(str, result["token_ids"])))
    else:
        print((prompt or "") + result["text"])
    output.say(
        f"{len(result['token_ids'])} tokens, {result['tokens_per_s']:.1f} per second including the "
        "prompt and, in a first run, compilation; experts: "
        f"{stats['slots']} of {stats['pages']} pages fit in {sizes.shown(stats['expert_bytes'])}"
        f", hit rate {stats['hit_rate']:.1%}, {sizes.shown(stats['bytes_demand'])} loaded on "
        f"demand, {sizes.shown(stats['bytes_prefetch'])} ahead, {stats['stall_seconds']:.2f} s "
        "waited",
        style="dim",
    )
