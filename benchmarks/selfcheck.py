"""Cost of the self-check of each engine's MoE kernels, with the shapes of one model.

python -m benchmarks selfcheck [--model shipped|balanced|mid] [--save FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import machine, models
from fluxmoe.cli.doctor import kernels
from fluxmoe.demo.model import SHIPPED
from fluxmoe.testing import checkpoints


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("selfcheck", description=__doc__.partition("\n")[0])
    models.add_option(parser)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write JSON with the machine")
    arguments = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = SHIPPED
        if arguments.model in models.RANDOM:  # only one layer is checked
            shape = models.RANDOM[arguments.model] | {"num_hidden_layers": 1}
            folder = checkpoints.write(Path(scratch) / arguments.model, **shape)
        for engine in kernels.ENGINES:  # one at a time, because times are measured
            with kernels.running([engine], folder) as wait:
                results += wait()
    table = Table(title=f"self-check, {arguments.model} model", title_justify="left")
    for column in ("engine", "kernel", "dtype", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for check in results:
        cost = check.problem if check.milliseconds is None else f"{check.milliseconds:.0f}"
        table.add_row(check.engine, check.kernel, check.dtype, cost)
    Console().print(table)
    if arguments.save:
        machine.save(arguments.save, [asdict(check) for check in results])
