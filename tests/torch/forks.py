"""A process that pages and forks: errors in its children, and their effects on the parent.

``python -m tests.torch.forks CHECKPOINT FOLDER`` prints one JSON object that maps cases to results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe.backends import op
from fluxmoe.core.transfer.host import HostCopier
from fluxmoe.errors import FluxMoEError, UnsupportedError
from fluxmoe.stores.disk.reader import PageReader
from fluxmoe.stores.disk.reads import PageReads
from fluxmoe.trace import TraceReader
from tests.forking import c_fork
from tests.identity.torch_cells import answer, prompts, same

CHECKPOINT, FOLDER = map(Path, sys.argv[1:3]) if len(sys.argv) == 3 else (Path(), Path())

#: Seconds after which a signal ends a child that hangs.
PATIENCE = 120

models: dict[str, Any] = {}
handles: dict[str, Any] = {}
stock: list[Any] = []


class End(BaseException):
    """An exception for a child that must end by reaching the end of the program."""


def start() -> None:
    """Page two models: one with all pages resident, and one with few, which makes many copies."""
    torch.set_num_threads(1)
    for name, settings in {
        "all": {"memory": "1GiB"},
        "few": {
            "memory": "1MiB",
            "prefetch": "next-layer",
            "copy_threads": 2,
            "stores": [{"kind": "file", "path": str(FOLDER / "pages")}],
        },
    }.items():
        models[name] = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, dtype="auto", experts_implementation="grouped_mm"
        ).eval()
        stock[:] = [answer(models[name], 2)]
        handles[name] = fluxmoe.page(models[name], **settings)


def unharmed() -> bool:
    for handle in handles.values():
        handle.check()
    return all(same(answer(model, 2), stock[0]) for model in models.values())


def refused(use: Callable[[], Any]) -> None:
    try:
        use()
    except UnsupportedError as error:
        assert error.code == "FM402" and "forked" in str(error), error
    else:
        raise AssertionError(f"{use} was not refused")


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts()).logits


def use_everything(model: Any, handle: Any) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    states = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype)
    substrate = handle._runtime.memory.substrate
    for use in (
        lambda: run(model),
        lambda: torch.no_grad()(model.model.layers[1].mlp)(states),
        lambda: torch.ops.fluxmoe.acquire(ids, handle._handle, 0),  # as compiled models do
        lambda: op.acquire(ids, handle._handle, 0),
        handle.stats,
        handle.check,
        handle.reset,
        lambda: handle.pager,
        lambda: handle.resize("2MiB"),
        lambda: handle.follow(lambda: "2MiB"),
        lambda: handle.record(FOLDER / "no").__enter__(),
        lambda: handle._runtime.pager.resize(0, 20),
        lambda: substrate.reserve(1 << 21),
        lambda: substrate.commit(0, np.arange(1)),
    ):
        refused(use)
    handle.close()
    handle.close()
    refused(lambda: run(model))  # closing does not unpage it


def use_and_leave() -> None:
    for name, model in models.items():
        use_everything(model, handles[name])
    os._exit(0)


def collect() -> None:
    gone = [weakref.ref(model) for model in models.values()]
    models.clear()
    handles.clear()
    gc.collect()
    assert not any(model() for model in gone)
    os._exit(0)


def page_another() -> None:
    with fluxmoe.page(AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto"), "1MiB") as h:
        assert same(answer(h.model, 2), stock[0])
        h.resize("2MiB")
        h.check()
    os._exit(0)


def end() -> None:
    raise End


def forked(child: Callable[[], Any], fork: Callable[[], int] = os.fork) -> int:
    """Run a function in a child; return the child's exit status, which is negative for a signal."""
    sys.stdout.flush()
    if pid := fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(PATIENCE)
    try:
        child()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(2)  # an error: the child should have ended by itself


def evaluate(name: str) -> Any:
    return run(models[name])


def pool() -> list[str]:
    found = []
    with multiprocessing.get_context("fork").Pool(2) as workers:
        for result in [workers.apply_async(evaluate, [name]) for name in [*models] * 2]:
            try:
                found.append(str(result.get(PATIENCE)))
            except FluxMoEError as error:
                found.append(error.code)
    return found


def while_another_thread_runs(child: Callable[[], Any]) -> int:
    """Fork while a pass in another thread holds the lock."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        go_on.wait(PATIENCE)

    hook = models["all"].model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=run, args=[models["all"]])
    thread.start()
    assert begun.wait(PATIENCE)
    status = forked(child)
    go_on.set()
    thread.join()
    hook.remove()
    return status


def while_pages_are_read(kind: str, child: Callable[[], Any]) -> int:
    """Fork while threads of a kind (``copy`` or ``read``) are reading the page file."""
    begun, go_on = threading.Event(), threading.Event()
    fetch, prefetch = PageReads.fetch, HostCopier.prefetch

    def slow(*args: Any) -> Any:
        if threading.current_thread().name.startswith(f"fluxmoe-{kind}"):
            begun.set()
            go_on.wait(PATIENCE)
        return fetch(*args)

    def patient(*args: Any) -> Any:
        yield from prefetch(*args)
        begun.wait(0.1)  # otherwise, the caller might withdraw all reads before one begins

    def passes() -> None:
        # A copy thread itself reads the pages that no read thread has begun to read, possibly all.
        while not begun.is_set():
            handles["few"].reset()
            run(models["few"])

    with (
        mock.patch.object(PageReads, "fetch", slow),
        mock.patch.object(HostCopier, "prefetch", patient),
        # Read threads read only what the page cache lacks.
        mock.patch.object(PageReader, "cached", lambda *_: kind == "copy"),
    ):
        thread = threading.Thread(target=passes, daemon=True)
        thread.start()
        assert begun.wait(PATIENCE)
        status = forked(child)
        go_on.set()
        thread.join()
    return status


def while_recording(child: Callable[[], Any]) -> list[Any]:
    found = []
    traces = [FOLDER / "plain", FOLDER / "forked"]
    for trace in traces:
        with handles["all"].record(trace, weights=True, replace=True) as recorder:
            recorder._writer._group_rows = 1  # writes part of the file
            run(models["all"])
            if trace is traces[1]:
                found.append(forked(child))
            run(models["all"])
    rows = [TraceReader(trace).num_rows for trace in traces]
    events = [
        [(step, layer, ids.tolist()) for step, layer, _, ids in TraceReader(trace).events()]
        for trace in traces
    ]
    return [*found, rows[0] > 0, events[0] == events[1], sorted(p.name for p in FOLDER.iterdir())]


def main() -> None:
    start()
    assert unharmed()
    found: dict[str, Any] = {}
    cases: dict[str, Callable[[], Any]] = {
        "use": lambda: forked(use_and_leave),
        "sys.exit": lambda: forked(lambda: sys.exit(0)),
        "os._exit": lambda: forked(lambda: os._exit(0)),
        "end": lambda: forked(end),
        "collect": lambda: forked(collect),
        "another model": lambda: forked(page_another),
        "C fork, use": lambda: forked(use_and_leave, c_fork),
        "C fork, sys.exit": lambda: forked(lambda: sys.exit(0), c_fork),
        "pool": pool,
        "thread, use": lambda: while_another_thread_runs(use_and_leave),
        "thread, sys.exit": lambda: while_another_thread_runs(lambda: sys.exit(0)),
        "copies, use": lambda: while_pages_are_read("copy", use_and_leave),
        "copies, sys.exit": lambda: while_pages_are_read("copy", lambda: sys.exit(0)),
        "reads, use": lambda: while_pages_are_read("read", use_and_leave),
        "reads, sys.exit": lambda: while_pages_are_read("read", lambda: sys.exit(0)),
        "recording, sys.exit": lambda: while_recording(lambda: sys.exit(0)),
        "recording, end": lambda: while_recording(end),
    }
    for name, case in cases.items():
        found[name] = [case(), unharmed()]
        if not found[name][1]:
            handles["all"].reset()  # for the next case
        print(name, found[name], file=sys.stderr, flush=True)  # shows which case hangs
    # Release the frames, as children formerly did, to check that the damage would be detected.
    substrate = handles["all"]._runtime.memory.substrate
    substrate.release(np.arange(substrate.count))
    found["control"] = unharmed()
    print(json.dumps(found))


if __name__ == "__main__":
    with contextlib.suppress(End):
        main()
