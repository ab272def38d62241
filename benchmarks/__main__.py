"""``python -m benchmarks [NAME [OPTIONS]]``: one benchmark, or all of them one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import event_cost, fuzz, http, serving

BENCHMARKS = {
    "event_cost": event_cost.main,
    "fuzz": fuzz.main,
    "http": http.main,
    "serving": serving.main,
}


def main() -> None:
    name, *options = sys.argv[1:] or ["all"]
    if name == "all":
        for each, run in BENCHMARKS.items():
            run(["--save", str(Path("benchmarks/out") / f"{each}.json")])
    elif name in BENCHMARKS:
        BENCHMARKS[name](options)
    else:
        sys.exit(f"no benchmark is called {name!r}; there are: {', '.join(BENCHMARKS)}")


if __name__ == "__main__":
    main()
