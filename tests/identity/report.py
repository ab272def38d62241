"""Tables of the matrix for the terminal, for test runs, and for docs/concepts/identity.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tests.identity.cells import TORCH_MODES, VLLM_MODES, Cell
from tests.identity.limits import Found
from tests.identity.outcome import Outcome

MODES = (*VLLM_MODES, *TORCH_MODES)


def summary(results: Mapping[Cell, Outcome]) -> list[list[str]]:
    """Make a table of identical cells and sequences, with a row per model and a column per mode."""
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
    """Describe the completed part of the matrix in one sentence."""
    good = sum(outcome.ok for outcome in results.values())
    return f"{len(results)} of {cells} cells have run, and {good} of them are identical.\n"


def by_setting(results: Mapping[Cell, Outcome]) -> list[list[str]]:
    """Make the same table for vLLM, with a row per eviction policy and a column per setting."""
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
    """Make a line per cell that is not identical."""
    return [f"{cell}: {_why(outcome)}" for cell, outcome in results.items() if not outcome.ok]


def limits(found: Iterable[Found]) -> list[list[str]]:
    """Make a table of trials with the errors of vLLM and FluxMoE."""
    table = [["requested", "stock vLLM on a CPU", "with FluxMoE"]]
    for trial in found:
        same = trial.vllm and trial.fluxmoe == trial.vllm
        table.append([trial.name, _code(trial.vllm), "the same" if same else _code(trial.fluxmoe)])
    return table


def markdown(table: list[list[str]]) -> str:
    """Format a table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]) + "\n"


def fill(page: str, parts: list[str]) -> str:
    """Replace a page's blocks ``<!-- report N --> … <!-- end -->`` with these parts."""
    return re.sub(
        r"(<!-- report (\d) -->\n).*?(<!-- end -->)",
        lambda block: f"{block[1]}{parts[int(block[2])]}{block[3]}",
        page,
        flags=re.DOTALL,
    )


def plain(table: list[list[str]]) -> str:
    """Format a table in columns."""
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
    """Format an error for a table cell."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else "runs"
