"""Tables of the matrix: for the terminal, for a test run, and for docs/concepts/identity.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tests.identity.cells import TORCH_MODES, VLLM_MODES, Cell
from tests.identity.limits import Found
from tests.identity.outcome import Outcome

MODES = (*VLLM_MODES, *TORCH_MODES)


def summary(results: Mapping[Cell, Outcome]) -> list[list[str]]:
    """A row per model, a column per mode: cells and sequences that were identical, of how many."""
    modes = [mode for mode in MODES if any(cell.mode == mode for cell in results)]
    table = [["model", *modes]]
    for model in dict.fromkeys(cell.model for cell in results):
        row = [model]
        for mode in modes:
            mine = [o for c, o in results.items() if (c.model, c.mode) == (model, mode)]
            row.append(_count(mine) if mine else "–")
        table.append(row)
    return table


def progress(results: Mapping[Cell, Outcome], cells: int) -> str:
    """How much of the matrix has run."""
    good = sum(outcome.ok for outcome in results.values())
    return f"{len(results)} of {cells} cells have run, {good} of them are identical.\n"


def by_setting(results: Mapping[Cell, Outcome]) -> list[list[str]]:
    """The same for vLLM, a row per eviction policy, a column per setting of vLLM."""
    vllm = {c: o for c, o in results.items() if c.prefix_caching is not None}
    settings = sorted({(c.prefix_caching, c.chunked_prefill) for c in vllm})
    table = [["eviction", *(_setting(prefix, chunked) for prefix, chunked in settings)]]
    for eviction in dict.fromkeys(cell.eviction for cell in vllm):
        row = [f"`{eviction}`"]
        for setting in settings:
            row.append(
                _count(
                    [
                        outcome
                        for cell, outcome in vllm.items()
                        if cell.eviction == eviction
                        and (cell.prefix_caching, cell.chunked_prefill) == setting
                    ]
                )
            )
        table.append(row)
    return table


def failures(results: Mapping[Cell, Outcome]) -> list[str]:
    """A line per cell that is not identical."""
    return [f"{cell}: {_why(outcome)}" for cell, outcome in results.items() if not outcome.ok]


def limits(found: Iterable[Found]) -> list[list[str]]:
    """What vLLM was asked, what it said, and what FluxMoE says."""
    table = [["asked", "stock vLLM on a CPU", "with FluxMoE"]]
    for trial in found:
        same = trial.vllm and trial.fluxmoe == trial.vllm
        table.append([trial.name, _code(trial.vllm), "the same" if same else _code(trial.fluxmoe)])
    return table


def markdown(table: list[list[str]]) -> str:
    """A table as docs write it."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]) + "\n"


def fill(page: str, parts: list[str]) -> str:
    """A page whose blocks ``<!-- report N --> … <!-- end -->`` have these parts."""
    return re.sub(
        r"(<!-- report (\d) -->\n).*?(<!-- end -->)",
        lambda block: f"{block[1]}{parts[int(block[2])]}{block[3]}",
        page,
        flags=re.DOTALL,
    )


def plain(table: list[list[str]]) -> str:
    """A table in columns."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _count(outcomes: list[Outcome]) -> str:
    good = sum(outcome.ok for outcome in outcomes)
    cells = f"{good}" if good == len(outcomes) else f"{good} of {len(outcomes)}"
    return f"{cells} cells, {sum(outcome.bits for outcome in outcomes)} sequences"


def _setting(prefix: bool | None, chunked: bool | None) -> str:
    return f"prefix {'on' if prefix else 'off'}, chunked {'on' if chunked else 'off'}"


def _why(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error
    note = " (stock does not agree with itself)" if outcome.stock_differs else ""
    return (
        f"{outcome.identical} of {outcome.sequences} sequences have the same tokens, "
        f"{outcome.bits} the same bits{note}"
    )


def _code(text: str) -> str:
    """An error in a table's cell."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else "runs"
