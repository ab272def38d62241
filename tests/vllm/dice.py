"""Arbitration policies that request random, adverse or invalid splits, for tests."""

from __future__ import annotations

import random

import fluxmoe


class Dice(fluxmoe.ArbitrationPolicy):
    """A policy that draws the experts' memory and the time of the next change at random."""

    def __init__(self) -> None:
        self._rng = random.Random(5)
        self._until, self._experts = 0, 0

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        if view.step >= self._until:
            self._until = view.step + self._rng.choice([2, 2, 3, 4, 7])
            least, most = view.bounds["experts"].min, view.bounds["experts"].max
            middle = view.frames["experts"]
            # Most throws draw a size above or below the current size, so that nearly every throw
            # moves memory.
            low, high = self._rng.choice([(least, middle), (middle, most), (least, most)])
            self._experts = self._rng.randint(low, max(low, high))
        experts = min(self._experts, view.total_frames)
        return fluxmoe.Split({"experts": experts, "kv": view.total_frames - experts}, "dice")


class Spite(fluxmoe.ArbitrationPolicy):
    """A policy that alternately gives the KV cache half of the budget and the cache's minimum."""

    def __init__(self) -> None:
        self._full = 0

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        kv = min(view.bounds["kv"].max, view.total_frames // 2)
        if view.step // 24 % 2:
            self._full += view.kv_used_frames >= 0.9 * view.frames["kv"]
            kv = view.bounds["kv"].min
        return fluxmoe.Split(
            {"experts": view.total_frames - kv, "kv": kv}, f"full {self._full} times"
        )


class Broken(fluxmoe.ArbitrationPolicy):
    """A policy that returns nonsense, and raises an error from time to time."""

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        if view.step % 3 == 0:
            raise RuntimeError("no idea")
        return fluxmoe.Split({"experts": -1, "kv": 10**9})


@fluxmoe.hookimpl
def fluxmoe_register_policies(register) -> None:
    register("dice", Dice)
    register("spite", Spite)
    register("broken", Broken)
