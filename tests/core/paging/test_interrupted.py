"""Interrupts between the choice of victims and their eviction."""

from __future__ import annotations

import numpy as np
import pytest

import fluxmoe
from fluxmoe.core.paging.table import PageTable
from fluxmoe.core.types import Geometry
from fluxmoe.policies.eviction.lru import LeastRecentlyUsed
from tests.core.rig import rule_for


class NotCompiled(fluxmoe.EvictionPolicy):
    """LRU without a kernel; its scores are stable."""

    stable_score = True

    def score(self, view, pages):
        return view.last_use[pages]


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, NotCompiled])
def test_victims_that_an_interrupt_kept_resident_can_be_chosen_again(policy, monkeypatch):
    table = PageTable(Geometry(4, 8), [8])
    rule = rule_for(table, policy(), name="pony")
    rule.run(0, 0, np.arange(8))
    assert rule.heap is not None
    with monkeypatch.context() as patch:
        patch.setattr(rule, "_unload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rule.run(0, 1, np.arange(8))
    for layer in range(1, 4):  # not layer 0, because a use puts a page back into the heap
        rule.run(1, layer, np.arange(8))
    table.check()


def interrupted(*_):
    raise KeyboardInterrupt
