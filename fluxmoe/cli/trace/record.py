"""``fluxmoe trace record``: record a model's routing while it answers prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fluxmoe import sizes
from fluxmoe.cli.generate import Backend
from fluxmoe.cli.shared import models, output
from fluxmoe.cli.shared.options import AsJson, Force, Plugins
from fluxmoe.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fluxmoe.findings import Findings

_WHERE = "fluxmoe trace record"


class Steps(StrEnum):
    """The kind of steps to record."""

    ALL = "all"
    PREFILL = "prefill"
    DECODE = "decode"


def record(
    model: Annotated[str, typer.Argument(help="Hugging Face checkpoint: a folder or a name.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    backend: Annotated[
        Backend, typer.Option(metavar="|".join(Backend), help="Engine that runs the model.")
    ] = Backend.TORCH,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt text; repeatable.")] = None,
    prompt_ids: Annotated[
        list[str] | None,
        typer.Option(metavar="1,2,3", help="Prompt as token ids instead of text; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: one text per line, or JSON lines (.jsonl) with `prompt` or "
            "`prompt_ids`."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens to generate per prompt.")
    ] = 64,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of forward passes to record.")
    ] = None,
    steps: Annotated[
        Steps,
        typer.Option(
            metavar="|".join(Steps), help="Record only steps that are mostly of this kind."
        ),
    ] = Steps.ALL,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="Sampling temperature; 0 means greedy decoding, which tends to loop."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 0,
    memory: Annotated[
        str,
        typer.Option(
            help="Memory for expert pages, such as 2GiB; with vllm, also for the KV cache."
        ),
    ] = "4GiB",
    eviction: Annotated[str, typer.Option(help="Eviction policy while recording.")] = "lru",
    prefetch: Annotated[str, typer.Option(help="Prefetch policy while recording.")] = "none",
    plugin: Plugins = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also record routing weights.")
    ] = False,
    predict: Annotated[
        bool,
        typer.Option(
            "--predict", help="Also record the experts that the next layer's router would choose."
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run prompts through a paged model and write a trace of its routing.

    Requests always run to --max-new-tokens; the end-of-text token does not stop them.
    """
    from fluxmoe.core.types import Phase
    from fluxmoe.findings import Findings
    from fluxmoe.trace import TraceReader
    from fluxmoe.trace.file import require_place

    found = Findings()
    if predict and backend is Backend.VLLM:
        found.errors.append(
            UnsupportedError(
                "vLLM's layers do not see the next layer's router",
                where="--predict",
                fix="use --backend torch",
            )
        )
    with found.check():  # the writer checks too, but only after the model has been loaded
        require_place(out, replace=force, by="--force")
    lines = _lines(prompt or [], prompt_ids or [], prompts, found)
    size = models.setting(model, "vocab_size")
    with found.check():
        models.require_length(model, 1 + max_new_tokens)
    for line in lines:
        if not isinstance(line, str) and size is not None:
            with found.check():
                models.require_tokens(line, size, "--prompt-ids or --prompts")
    options: dict[str, Any] = {
        "weights": weights,
        "max_steps": max_steps,
        "phase": None if steps is Steps.ALL else Phase[steps.name],
        "replace": force,
    }
    if backend is Backend.TORCH:
        options["predict"] = predict
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings = {
        "memory": {"budget": memory},
        "eviction": eviction,
        "prefetch": prefetch,
        "plugins": plugin or [],
    }
    longest = max((len(line) for line in lines if not isinstance(line, str)), default=1)
    start = _torch if backend is Backend.TORCH else _vllm
    run = start(model, settings, found, batch, longest + max_new_tokens)
    found.require()
    for note in found.notes:
        output.warn(note)
    models.quiet()
    requests = _requests(model, lines, size)
    stats = run(_Work(requests, out, batch, sampling, options))
    reader = TraceReader(out)
    result = {
        "trace": str(out),
        "model": model,
        "backend": str(backend),
        "requests": len(requests),
        "num_layers": reader.meta.num_layers,
        "experts_per_layer": reader.meta.experts_per_layer,
        "top_k": reader.meta.top_k,
        "rows": reader.num_rows,
        "columns": list(reader.columns),
        "file_bytes": out.stat().st_size,
        "stats": stats,
    }
    if as_json:
        output.print_json(result)
        return
    print(
        f"{out}: {reader.num_rows} rows (a row is a token in a layer), "
        f"{reader.meta.num_layers} layers x {reader.meta.experts_per_layer} experts, top "
        f"{reader.meta.top_k}, {sizes.shown(out.stat().st_size)}"
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """Requests to a paged model, and arguments for sampling and for the recorder."""

    requests: list[list[int]]
    out: Path
    batch: int
    sampling: dict[str, Any]
    options: dict[str, Any]


#: Function that starts an engine, records a trace and returns the engine's statistics.
_Run: TypeAlias = Callable[[_Work], dict[str, Any]]


def _torch(model: str, settings: dict[str, Any], found: Findings, _batch: int, _: int) -> _Run:
    """Check all that can be checked without the engine; return the function that starts it."""
    from fluxmoe import config
    from fluxmoe.backends.torch import loader

    parsed = config.parse_most(settings, found, where=_WHERE)
    ready = loader.prepare(model, parsed, found, where=_WHERE)

    def run(work: _Work) -> dict[str, Any]:
        from fluxmoe.backends.torch.sampling import sample

        assert ready is not None  # otherwise an error was found
        with ready.load() as paged, paged.record(work.out, **work.options) as recorder:
            for first in range(0, len(work.requests), work.batch):
                if recorder.done:
                    break
                recorder.first_request = first
                sample(
                    paged.model,
                    work.requests[first : first + work.batch],
                    stop=lambda: recorder.done,
                    **{**work.sampling, "seed": work.sampling["seed"] + first},
                )
            return paged.stats()

    return run


def _vllm(model: str, settings: dict[str, Any], found: Findings, batch: int, least: int) -> _Run:
    """Do the same for vLLM.

    The model must accept ``batch`` requests at once, of ``least`` tokens each.
    """
    from fluxmoe.backends.vllm.child import child
    from fluxmoe.backends.vllm.child.traces import record

    options: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": batch, "block_size": 32}
    child.examine(model, settings, found, where=_WHERE, max_model_len=least, **options)

    def run(work: _Work) -> dict[str, Any]:
        new = work.sampling["max_new_tokens"]
        prompts = [
            child.Prompt(
                tokens,
                new,
                temperature=work.sampling["temperature"],
                seed=work.sampling["seed"] + index,
            )
            for index, tokens in enumerate(work.requests)
        ]
        with child.ChildEngine(
            model,
            fluxmoe=settings,
            max_model_len=max(map(len, work.requests)) + new,
            **options,
        ) as engine:
            return record(engine, prompts, work.out, batch=work.batch, **work.options)

    return run


def _lines(
    texts: list[str], numbers: list[str], file: Path | None, found: Findings
) -> list[str | list[int]]:
    """Collect the valid prompts, as text or token ids; add errors of the others to ``found``."""
    before = len(found.errors)
    lines: list[str | list[int]] = [*texts]
    for each in numbers:
        ids = found.result(models.numbers, each, "--prompt-ids")
        lines += [] if ids is None else [ids]
    lines += [] if file is None else found.result(_read, file) or []
    if not lines and len(found.errors) == before:
        found.errors.append(
            ConfigError("no prompt given", fix="give --prompt, --prompt-ids or --prompts")
        )
    return lines


def _requests(model: str, lines: list[str | list[int]], size: int | None) -> list[list[int]]:
    """Convert prompts to token ids; ``size`` is the model's vocabulary size, if known."""
    tokenizer: PreTrainedTokenizerBase | None = None
    if any(isinstance(line, str) for line in lines):
        tokenizer = models.tokenizer(model, required=True)
    size = size or models.config(model).get_text_config().vocab_size
    requests = [models.encode(tokenizer, line) if isinstance(line, str) else line for line in lines]
    for tokens in requests:
        models.require_tokens(tokens, size, "--prompt, --prompt-ids or --prompts")
    return requests


def _read(file: Path) -> list[str | list[int]]:
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts: {error}", where="--prompts") from error
    if file.suffix != ".jsonl":
        return [*lines]
    found: list[str | list[int]] = []
    for number, line in enumerate(lines, 1):
        where = f"--prompts {file}, line {number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not valid JSON: {error}", where=where) from error
        value: Any = None
        if isinstance(data, dict):
            value = data.get("prompt_ids", data.get("prompt"))
        ids = isinstance(value, list) and all(type(token) is int for token in value)
        if not ids and not isinstance(value, str):
            raise ConfigError("neither a `prompt` (text) nor `prompt_ids` (numbers)", where=where)
        found.append(value)
    return found
