"""An eviction policy in three lines: evict the page that was used last.

This policy is optimal if every layer uses all its experts, one layer after the other, and poor
otherwise.
"""

import fluxmoe


class MostRecentlyUsed(fluxmoe.EvictionPolicy):
    """Evict the page that was used last."""

    def score(self, view, pages):  # keep the highest, evict the lowest
        return -view.last_use[pages]


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("mru", MostRecentlyUsed)
