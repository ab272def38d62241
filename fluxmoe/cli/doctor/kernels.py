"""The self-check of each engine's MoE kernels on this machine, in separate processes.

The processes are separate because importing an engine takes seconds and prints text. The check uses
the shapes of one model, by default the shipped model. An engine repeats the check at every start
with the shapes of the model that it serves.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxmoe import machine
from fluxmoe.demo.model import SHIPPED, DemoModel
from fluxmoe.errors import FluxMoEError, UnsupportedError

#: The data types for which there are separate kernels.
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """The check of one kernel.

    Attributes:
        engine: ``torch`` or ``vLLM``.
        kernel: The kernel's name; empty if an error occurred before the engine chose a kernel.
        dtype: The data type of the weights.
        processor: Name of the processor.
        same: True if the result has the same bits with the experts in any slots; None if unknown.
        milliseconds: Duration of the check; None if the check failed.
        problem, fix: The error and its remedy.
    """

    engine: str
    kernel: str
    dtype: str
    processor: str
    same: bool | None
    milliseconds: float | None = None
    problem: str = ""
    fix: str = ""


@contextmanager
def running(
    engines: Sequence[str], folder: Path = SHIPPED
) -> Iterator[Callable[[], list[KernelCheck]]]:
    """Check engines' kernels in the background; yield a function that waits for the results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(len(engines), 1), context, _silent) as pool:
        started = [(engine, pool.submit(ENGINES[engine], folder)) for engine in engines]
        yield lambda: [check for engine, future in started for check in _result(engine, future)]


def _result(engine: str, future: Future[list[KernelCheck]]) -> list[KernelCheck]:
    try:
        return future.result()
    except (FluxMoEError, BrokenExecutor, ImportError, OSError, RuntimeError) as error:
        return [_failed(engine, "", "", error)]


def _failed(engine: str, kernel: str, dtype: str, error: Exception) -> KernelCheck:
    what, fix = str(error).partition("\n")[0], f"import {engine.lower()} in Python to see more"
    same = None
    if isinstance(error, FluxMoEError):
        what, fix = error.what, error.fix
        if isinstance(error, UnsupportedError):
            what, same = f"{what} ({error.where})", False
    return KernelCheck(engine, kernel, dtype, machine.processor(), same, None, what, fix)


def _check(engine: str, kernel: str, dtype: str, check: Callable[[], Any]) -> KernelCheck:
    """Run ``check``, which returns a ``backends.selfcheck.Checked``, and make the row for it."""
    try:
        found = check()
    except FluxMoEError as error:
        return _failed(engine, kernel, dtype, error)
    took = round(found.milliseconds, 1)
    return KernelCheck(engine, found.kernel, dtype, machine.processor(), True, took)


def _of_torch(folder: Path) -> list[KernelCheck]:
    import torch

    from fluxmoe.backends.torch import experts, layout, pretrained, twin

    found = []
    for dtype in _DTYPES:
        model = pretrained.on_meta(str(folder), str(folder), getattr(torch, dtype), {})
        layer = layout.experts_of(model)[0]
        for name in twin.IMPLEMENTATIONS:
            found.append(_check("torch", name, dtype, partial(experts.require_sound, layer, name)))
    return found


def _of_vllm(folder: Path) -> list[KernelCheck]:
    from fluxmoe.backends.vllm.child.child import ChildEngine

    model, found = DemoModel.read(folder), []
    options = model.options(max_num_seqs=1) | {
        "fluxmoe": {"memory": {"budget": 4 * model.experts * model.page_bytes + (64 << 20)}},
        "load_format": "dummy",
        "hf_overrides": {"num_hidden_layers": 1},
    }
    engine: ChildEngine | None = None

    def start(dtype: str) -> Any:
        nonlocal engine
        if engine is None:
            engine = ChildEngine(folder, dtype=dtype, **options)
        else:
            engine.restart(dtype=dtype, **options)
        return engine.call("kernel")

    try:
        for dtype in _DTYPES:
            found.append(_check("vLLM", "", dtype, partial(start, dtype)))
    finally:
        if engine is not None:
            engine.close()
    return found


ENGINES = {"torch": _of_torch, "vLLM": _of_vllm}


def _silent() -> None:
    """Discard this process's output, because standard output may be reserved for JSON."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
