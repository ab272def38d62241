"""``python -m tests.sim.golden``: write ``golden.json``, the misses of all policies on the traces.

Run the command after a change that is meant to change a number, and review the diff before
committing.
"""

import json
from pathlib import Path

from fluxmoe import plugins
from fluxmoe import policies as built_in
from fluxmoe.sim.events import Events
from fluxmoe.sim.simulator import simulate
from fluxmoe.trace import shipped

FILE = Path(__file__).with_name("golden.json")
#: Slots, for 384 pages; the largest event of decode-64 and of prefill has 64 pages.
CAPACITIES = (64, 80, 96, 144, 192, 240, 288, 336)
#: Slots for a quarter, a half and three quarters of the pages.
PREFETCH_CAPACITIES = (96, 192, 288)


def policies(kind):
    """List the built-in policies, without those of installed plugins."""
    registry = plugins.Registry()
    registry.add(built_in, "fluxmoe")
    return registry.names(kind)


def table(trace, policy, capacities=CAPACITIES):
    """Compute misses at each capacity."""
    return [simulate(trace, policy, c).misses for c in capacities]


def prefetch_table(trace, prefetch, capacities=PREFETCH_CAPACITIES):
    """Compute misses and prefetched pages under ``next-use``, at three capacities."""
    runs = [simulate(trace, "next-use", c, prefetch) for c in capacities]
    return [[run.misses, run.loads_prefetch] for run in runs]


def main():
    rows = []
    for name in shipped.NAMES:
        events = Events.load(shipped.path(name))
        for policy in policies("eviction"):
            rows.append([name, "eviction", policy, table(events, policy)])
        for policy in policies("prefetch"):
            rows.append([name, "prefetch", policy, prefetch_table(events, policy)])
    lines = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
