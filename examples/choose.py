"""Comparison of all eviction policies with an oracle on a trace, without a model.

Usage: python examples/choose.py [TRACE.parquet]
"""

import sys

from fluxmoe import plugins
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import shipped

ORACLE = "belady"


def main() -> None:
    events = Events.load(sys.argv[1] if len(sys.argv) > 1 else shipped.path("decode-8"))
    policies = [policy.name for policy in plugins.load() if policy.kind == "eviction"]
    for capacity in ("25%", "50%", "75%"):
        misses = {name: simulate(events, name, capacity).misses for name in policies}
        optimum = misses.pop(ORACLE)
        best = min(misses, key=misses.__getitem__)
        print(f"{capacity}: {best} misses {misses[best]} times, {ORACLE} {optimum} times;")
        others = sorted(misses.items(), key=lambda item: item[1])[1:]
        print("     " + ", ".join(f"{name} {count}" for name, count in others))


if __name__ == "__main__":
    main()
