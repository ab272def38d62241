"""``python -m benchmarks [NAME [OPTIONS]]``: run one benchmark, or all of them in turn."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

#: Name of a benchmark → module whose ``main(options)`` runs it.
BENCHMARKS = {
    "codec": "benchmarks.codec",
    "event_cost": "benchmarks.event_cost",
    "fuzz": "benchmarks.fuzz",
    "http": "benchmarks.http",
    "phases": "benchmarks.phases",
    "policies": "benchmarks.policies",
    "reaction": "benchmarks.reaction",
    "recording": "benchmarks.recording",
    "selfcheck": "benchmarks.selfcheck",
    "serving": "benchmarks.serving",
    "simulated_speed": "benchmarks.simulated_speed",
    "simulator": "benchmarks.simulator",
}
#: Run by name only: comparisons of answers or memory, and benchmarks that need a GPU or other
#: engines.
CHECKS = {
    "disk": "benchmarks.disk.command",
    "gpu": "benchmarks.gpu.command",
    "identity": "tests.identity.command",
    "loading": "benchmarks.loading",
    "soak": "benchmarks.soak",
}


def main() -> None:
    name, *options = sys.argv[1:] or ["all"]
    if name == "all":
        for each in BENCHMARKS:
            _run(each, ["--save", str(Path("benchmarks/out") / f"{each}.json")])
    elif name in BENCHMARKS | CHECKS:
        _run(name, options)
    else:
        there = ", ".join(BENCHMARKS | CHECKS)
        sys.exit(f"no benchmark is called {name!r}; known benchmarks: {there}")


def _run(name: str, options: list[str]) -> None:
    import_module((BENCHMARKS | CHECKS)[name]).main(options)


if __name__ == "__main__":
    main()
