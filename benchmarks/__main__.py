"""``python -m benchmarks [NAME [OPTIONS]]``: one benchmark, or all of them one after the other."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

#: Name → the module here whose ``main(options)`` it is.
BENCHMARKS = {
    "codec": "codec",
    "event_cost": "event_cost",
    "fuzz": "fuzz",
    "http": "http",
    "phases": "phases",
    "policies": "policies",
    "reaction": "reaction",
    "recording": "recording",
    "serving": "serving",
    "simulated_speed": "simulated_speed",
    "simulator": "simulator",
}
#: Run by name only: what compares answers instead of times and takes hours, and what needs a GPU.
CHECKS = {"gpu": "gpu.command", "identity": "identity.command"}


def main() -> None:
    name, *options = sys.argv[1:] or ["all"]
    if name == "all":
        for each in BENCHMARKS:
            _run(each, ["--save", str(Path("benchmarks/out") / f"{each}.json")])
    elif name in BENCHMARKS | CHECKS:
        _run(name, options)
    else:
        there = ", ".join(BENCHMARKS | CHECKS)
        sys.exit(f"no benchmark is called {name!r}; there are: {there}")


def _run(name: str, options: list[str]) -> None:
    import_module(f"benchmarks.{(BENCHMARKS | CHECKS)[name]}").main(options)


if __name__ == "__main__":
    main()
