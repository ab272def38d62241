"""``python -m benchmarks [NAME [OPTIONS]]``: one benchmark, or all of them one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import event_cost, http, serving, simulator
from benchmarks.identity import command as identity

BENCHMARKS = {
    "event_cost": event_cost.main,
    "http": http.main,
    "serving": serving.main,
    "simulator": simulator.main,
}
#: What compares answers instead of times; it takes hours and is run by name only.
CHECKS = {"identity": identity.main}


def main() -> None:
    name, *options = sys.argv[1:] or ["all"]
    if name == "all":
        for each, run in BENCHMARKS.items():
            run(["--save", str(Path("benchmarks/out") / f"{each}.json")])
    elif name in BENCHMARKS | CHECKS:
        (BENCHMARKS | CHECKS)[name](options)
    else:
        known = ", ".join(BENCHMARKS | CHECKS)
        sys.exit(f"no benchmark is called {name!r}; there are: {known}")


if __name__ == "__main__":
    main()
