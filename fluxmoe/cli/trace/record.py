"""``fluxmoe trace record``: record a model's routing while it answers prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.arguments import require_new
from fluxmoe.cli.generate import Backend
from fluxmoe.cli.shared import models, output
from fluxmoe.cli.shared.options import AsJson, Force
from fluxmoe.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Steps(StrEnum):
    """The kind of steps to record."""

    ALL = "all"
    PREFILL = "prefill"
    DECODE = "decode"


def record(
    model: Annotated[str, typer.Argument(help="Hugging Face checkpoint: folder or name.")],
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
            help="File of prompts: one text per line, or .jsonl with `prompt` or `prompt_ids`."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 64,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of forward passes to record.")
    ] = None,
    steps: Annotated[
        Steps,
        typer.Option(metavar="|".join(Steps), help="Record only steps mostly of this kind."),
    ] = Steps.ALL,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="Sampling temperature; 0 is greedy, which tends to loop."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 0,
    memory: Annotated[
        str, typer.Option(help="Memory for expert pages, such as 2GiB; vllm: and the KV cache.")
    ] = "4GiB",
    eviction: Annotated[str, typer.Option(help="Eviction policy while recording.")] = "lru",
    weights: Annotated[bool, typer.Option("--weights", help="Also record router weights.")] = False,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Also record the choices of the next layer's router."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run prompts through a paged model and write a trace of its routing.

    Requests always run to --max-new-tokens; the end-of-text token does not stop them.
    """
    from fluxmoe.core.types import Phase
    from fluxmoe.trace import TraceReader

    if predict and backend is Backend.VLLM:
        raise UnsupportedError(
            "vLLM's layers do not see the next layer's router",
            where="--predict",
            fix="use --backend torch",
        )
    require_new(out, replace=force)  # the writer also checks, but after loading the model
    models.quiet()
    requests = _requests(model, prompt or [], prompt_ids or [], prompts)
    options: dict[str, Any] = {
        "weights": weights,
        "max_steps": max_steps,
        "phase": None if steps is Steps.ALL else Phase[steps.name],
        "replace": force,
    }
    if backend is Backend.TORCH:
        options["predict"] = predict
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    work = _Work(model, requests, out, batch, memory, eviction, sampling, options)
    stats = work.with_torch() if backend is Backend.TORCH else work.with_vllm()
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
    """Requests for a paged model, and the arguments of the recorder."""

    model: str
    requests: list[list[int]]
    out: Path
    batch: int
    memory: str
    eviction: str
    sampling: dict[str, Any]
    options: dict[str, Any]

    def with_torch(self) -> dict[str, Any]:
        import fluxmoe
        from fluxmoe.backends.torch.pretrained import unpaged
        from fluxmoe.backends.torch.sampling import sample

        loaded = unpaged(self.model)
        vocabulary = loaded.get_input_embeddings().num_embeddings
        for tokens in self.requests:
            if not all(0 <= token < vocabulary for token in tokens):
                raise ConfigError(
                    f"invalid prompt tokens: {tokens}", fix=f"all must be within 0…{vocabulary - 1}"
                )
        with (
            fluxmoe.page(loaded, self.memory, eviction=self.eviction) as paged,
            paged.record(self.out, **self.options) as recorder,
        ):
            for first in range(0, len(self.requests), self.batch):
                if recorder.done:
                    break
                recorder.first_request = first
                sample(
                    loaded,
                    self.requests[first : first + self.batch],
                    stop=lambda: recorder.done,
                    **{**self.sampling, "seed": self.sampling["seed"] + first},
                )
            return paged.stats()

    def with_vllm(self) -> dict[str, Any]:
        from fluxmoe.backends.vllm.child.child import ChildEngine, Prompt
        from fluxmoe.backends.vllm.child.traces import record

        prompts = [
            Prompt(
                tokens,
                self.sampling["max_new_tokens"],
                temperature=self.sampling["temperature"],
                seed=self.sampling["seed"] + index,
            )
            for index, tokens in enumerate(self.requests)
        ]
        with ChildEngine(
            self.model,
            fluxmoe={"memory": {"budget": self.memory}, "eviction": self.eviction},
            enforce_eager=True,
            max_num_seqs=self.batch,
            max_model_len=max(map(len, self.requests)) + self.sampling["max_new_tokens"],
            block_size=32,
        ) as engine:
            return record(engine, prompts, self.out, batch=self.batch, **self.options)


def _requests(
    model: str, texts: list[str], numbers: list[str], file: Path | None
) -> list[list[int]]:
    """Collect all prompts as token ids."""
    lines: list[str | list[int]] = [*texts]
    lines += [models.numbers(each, "--prompt-ids") for each in numbers]
    lines += [] if file is None else _read(file)
    if not lines:
        raise ConfigError("no prompt given", fix="give --prompt, --prompt-ids or --prompts")
    tokenizer: PreTrainedTokenizerBase | None = None
    if any(isinstance(line, str) for line in lines):
        tokenizer = models.tokenizer(model, required=True)
    requests = [models.encode(tokenizer, line) if isinstance(line, str) else line for line in lines]
    if not all(requests):
        raise ConfigError("a prompt is empty", fix="give each prompt at least one token")
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
