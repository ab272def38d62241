"""A picture of a plan: tokens per second and step time by split."""

from __future__ import annotations

from pathlib import Path

from fluxmoe.draw.plot import ACCENT, GREY, INK, Plot, canvas_for, round_up, save
from fluxmoe.plan.advice import Plan

_WIDTH, _HEIGHT, _HEAD = 1000, 440, 64


def draw(plan: Plan, path: Path) -> None:
    """Write the picture.

    Args:
        plan: The plan to draw.
        path: An ``.svg`` or ``.png`` file.

    Raises:
        ConfigError: The suffix is neither ``.svg`` nor ``.png``.
        MissingDependencyError: The file is a PNG and Pillow is not installed.
        TraceError: The file cannot be written.
    """
    canvas = canvas_for(path, _WIDTH, _HEIGHT)
    model, work, best = plan.model, plan.work, plan.recommended
    power, unit = (30, "GiB") if plan.memory >= 1 << 30 else (20, "MiB")
    canvas.text(24, 28, f"{model.architecture} in {plan.memory / 2**power:.4g} {unit}", size=18)
    canvas.text(
        24,
        50,
        f"{plan.hardware}; up to {work.requests} requests of {work.tokens} tokens; "
        f"dashed: recommended, {best.resident_share:.1%} of the experts resident",
        colour=GREY,
    )
    width, height = _WIDTH / 2, _HEIGHT - _HEAD
    left, right = (
        Plot(canvas, side + 66, _HEAD + 40, width - 100, height - 96) for side in (0.0, width)
    )
    # The x axis spans the whole budget: the KV cache has the part that the experts do not use.
    ticks = [(i / 4, f"{plan.memory * i / 4 / 2**power:.3g}") for i in range(5)]
    where = [point.expert_bytes / plan.memory for point in plan.curve]
    rates = [point.tokens_per_s for point in plan.curve]
    top = round_up(max(rates))
    label = f"{unit} for experts; the rest is KV cache"
    left.frame("Tokens per second", label, ticks, _levels(top))
    left.curve([(x, rate / top) for x, rate in zip(where, rates, strict=True)], INK, 2)
    steps = [point.step_ms for point in plan.curve]
    top = round_up(max(steps))
    right.frame("Step in ms (light: without waiting for experts)", label, ticks, _levels(top))
    busy = [(point.step_ms - point.stall_ms) / top for point in plan.curve]
    right.curve(list(zip(where, busy, strict=True)), "#b9cde6", 2)
    right.curve([(x, step / top) for x, step in zip(where, steps, strict=True)], INK, 2)
    mark = best.expert_bytes / plan.memory
    for plot in (left, right):
        plot.curve([(mark, 0), (mark, 1)], ACCENT, 1.4, dashed=True)
    save(canvas, path)


def _levels(top: float) -> list[tuple[float, str]]:
    return [(i / 4, f"{top * i / 4:.6g}") for i in range(5)]
