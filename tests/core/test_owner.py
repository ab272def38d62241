"""A forked child cannot affect the memory and threads of its parent."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.host import CpuSubstrate
from fluxmoe.core.owner import Owner
from fluxmoe.core.transfer.jobs import Job, JobPool, Urgency
from fluxmoe.errors import UnsupportedError
from fluxmoe.stores.disk.pagewriter import PageFileWriter
from tests.forking import FORKS


def status(child: Callable[[], None], fork: str) -> int:
    if pid := FORKS[fork]():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler needs the interpreter
    signal.alarm(60)
    try:
        child()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.mark.parametrize("fork", FORKS)
def test_frames(fork: str) -> None:
    substrate = CpuSubstrate(4, 4096)
    arena = Arena(substrate, 4 * 4096)
    arena.commit(0, np.arange(3))
    rows = arena.rows(3, 4096)
    rows[:] = 7

    def child() -> None:
        for use in (lambda: substrate.reserve(4096), lambda: arena.commit(3, np.arange(3, 4))):
            with pytest.raises(UnsupportedError, match="forked"):
                use()
        substrate.release(arena.decommit(0, 2))
        substrate.release(arena.close())
        substrate.close()

    assert status(child, fork) == 0
    assert (rows == 7).all()
    assert substrate.allocated() == 3 * 4096
    substrate.release(arena.close())
    assert substrate.allocated() == 0
    substrate.close()


@pytest.mark.parametrize("fork", FORKS)
def test_copy_threads(fork: str) -> None:
    copiers = JobPool(2, "copy", where="copy_threads")
    assert status(copiers.close, fork) == 0
    copiers.order(copy := Job(lambda: None), Urgency.DEMAND)
    assert copy.error() is None
    copiers.close()


@pytest.mark.parametrize("fork", FORKS)
def test_a_page_file_that_is_being_written(fork: str, tmp_path: Path) -> None:
    writer = PageFileWriter(tmp_path / "p.pages", {}, 1, [10])
    assert status(writer.abandon, fork) == 0
    writer.append(0, [np.zeros(10, np.uint8)], [0])
    writer.finish(direct=False).close()
    assert (tmp_path / "p.pages").exists()


def test_the_owner_itself() -> None:
    owner = Owner()
    assert owner.here
    owner.require()
