"""A test policy that moves memory constantly and gives a reason that cannot be printed."""

from __future__ import annotations

import fluxmoe


class Mumbles(fluxmoe.ArbitrationPolicy):
    """A policy that moves memory back and forth every few steps."""

    def split(self, view: fluxmoe.ArbitrationView) -> fluxmoe.Split:
        bounds = view.bounds["experts"]
        experts = min(bounds.min if view.step // 8 % 2 else bounds.max, view.total_frames)
        reason = f"step {view.step}\n\ud800\x00\x1b[2J" + "x" * 1_000_000
        return fluxmoe.Split({"experts": experts, "kv": view.total_frames - experts}, reason)


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):  # type: ignore[no-untyped-def]
    register("mumbles", Mumbles)
