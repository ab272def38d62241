"""Run of `check` under compute-sanitizer: memory errors, races, uninitialised reads and barriers.

python -m benchmarks gpu sanitize [--tool memcheck]…
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu import device as gpu
from fluxmoe.errors import MissingDependencyError

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main(argv: list[str]) -> None:
    parser = gpu.arguments("sanitize", __doc__)
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    options = parser.parse_args(argv)
    gpu.require()
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise MissingDependencyError(
            "compute-sanitizer is not on PATH",
            fix="it comes with the CUDA toolkit: export PATH=/usr/local/cuda/bin:$PATH",
        )
    rows: list[dict[str, Any]] = []
    for tool in options.tool or TOOLS:
        command = [program, f"--tool={tool}", "--error-exitcode=99"]
        command += [sys.executable, "-m", "benchmarks", "gpu", "check"]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
        rows.append({"tool": tool, "status": done.returncode, "summary": (lines or ["none"])[-1]})
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    gpu.report(options, "compute-sanitizer", rows)
    if any(row["status"] for row in rows):
        raise SystemExit("compute-sanitizer found something; see above")
