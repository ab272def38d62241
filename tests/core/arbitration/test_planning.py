"""Planning: a requested split, restricted by bounds, limits and the KV cache in use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxmoe.core.arbitration.messages import Inventory
from fluxmoe.core.arbitration.planning import Planner
from fluxmoe.core.memory.kv import KVLayout
from fluxmoe.core.policy.arbitration import ArbitrationView, Split
from fluxmoe.core.types import Budget, Geometry
from tests.core.rig import FRAME, PAGE_CLASS

INVENTORY = Inventory(
    frames=40,
    geometry=Geometry(4, 4),
    page_class=PAGE_CLASS,
    bank_limit=None,
    minimum=4,
    slots=(10,),
    experts=Budget(6, 0, 36),
    kv=Budget(3, 0, 34),
    layout=KVLayout(20, FRAME, FRAME),
    groups=20,
)
VIEW = ArbitrationView(
    {"experts": 20, "kv": 20}, 40, {"experts": INVENTORY.experts, "kv": INVENTORY.kv}
)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("used", "floor"), [(0, 3), (3, 3), (12, 12), (20, 20), (25, 20)])
def test_kv_cache_in_use_stays_when_frames_move_to_the_experts(used, floor, fill):
    planner = Planner(INVENTORY, lambda groups: ())
    view = replace(VIEW, kv_used_frames=used)
    for wish in ({"experts": 40, "kv": 0}, {"experts": 36, "kv": 4}, {"experts": 20, "kv": 20}):
        wanted = planner.within(Split(wish), view, fill=fill)
        rest = 40 - INVENTORY.experts.max if fill else 0  # the experts cannot use this rest
        assert wanted["kv"] == max(wish["kv"], floor, rest)
        assert sum(wanted.values()) <= 40


def test_kv_cache_in_use_stays_under_a_lowered_limit():
    planner = Planner(INVENTORY, lambda groups: ())
    view = replace(VIEW, total_frames=24, kv_used_frames=15)
    assert planner.within(Split({"experts": 24, "kv": 0}), view, fill=True) == {
        "experts": 9,
        "kv": 15,
    }
