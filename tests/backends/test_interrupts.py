"""Ctrl-C waits for the end of a block, and then takes its usual effect."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from fluxmoe.backends.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Set Python's handler, because a process started in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_comes_after_the_block() -> None:
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_pass_and_restore_the_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_and_ignored_signals() -> None:
    found = []

    def work() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found[1] is signal.SIG_IGN


def test_every_handler_waits_and_each_is_called() -> None:
    called: list[int] = []

    def late(number: int, _: object) -> None:
        called.append(number)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    try:
        done = False
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGALRM)
            signal.raise_signal(signal.SIGINT)
            done = True
        assert done and called == [signal.SIGALRM]
        assert signal.getsignal(signal.SIGALRM) is late
        with pytest.raises(TimeoutError):
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)
