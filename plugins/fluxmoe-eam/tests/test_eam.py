from types import SimpleNamespace

import numpy as np
import pytest
from fluxmoe_eam import ActivationMatrices

import fluxmoe
from fluxmoe import plugins
from fluxmoe.errors import ConfigError
from fluxmoe.sim.simulator import simulate
from fluxmoe.testing import GOLDEN, check_prefetch_policy

LAYERS, EXPERTS = 3, 4
VIEW = SimpleNamespace(
    num_layers=LAYERS,
    experts_per_layer=EXPERTS,
    page_of=lambda layer, experts: layer * EXPERTS + np.asarray(experts, np.int64),
)


@pytest.fixture
def registry():
    return plugins.load(["fluxmoe_eam"])


@pytest.mark.parametrize("options", [{}, {"lead": 3}, {"keep": 1}, {"lead": 99, "keep": 2}])
def test_it_keeps_to_the_contract(options):
    check_prefetch_policy(lambda: ActivationMatrices(**options))


def step(policy, number, experts):
    """Run a step; return the proposals in each layer. ``experts``: layer → expert → tokens."""
    proposed = []
    for layer, used in enumerate(experts):
        ids, tokens = np.array(sorted(used)), np.array([used[e] for e in sorted(used)])
        access = fluxmoe.Access(
            step=number,
            layer=layer,
            pages=layer * EXPERTS + ids,
            hit=np.zeros(len(ids), bool),
            tokens=tokens,
        )
        proposed.append([int(page) for page in policy.propose(VIEW, access)])
    return proposed


ONE = [{0: 4}, {1: 3, 2: 1}, {3: 4}]
OTHER = [{3: 4}, {0: 4}, {0: 1, 1: 3}]


def test_what_followed_the_most_similar_beginning_is_fetched():
    policy = ActivationMatrices(lead=2)
    assert step(policy, 0, ONE) == [[], [], []]  # no matrix is kept yet
    step(policy, 1, OTHER)
    first, second, last = step(policy, 2, ONE)
    # The next layer's expert has the urgency 3/4 · 2/3, and the last layer's 1 · 1/3.
    assert first == [1 * EXPERTS + 1, 2 * EXPERTS + 3]
    assert second == [2 * EXPERTS + 3]
    assert last == []
    assert step(policy, 3, OTHER)[0] == [1 * EXPERTS + 0, 2 * EXPERTS + 1]


def test_a_full_collection_replaces_what_is_most_similar():
    policy = ActivationMatrices(keep=2)
    step(policy, 0, ONE)
    step(policy, 1, OTHER)
    step(policy, 2, [{0: 4}, {3: 4}, {3: 4}])  # like ONE
    step(policy, 3, OTHER)
    assert step(policy, 4, ONE)[0] == [1 * EXPERTS + 3]
    assert step(policy, 5, OTHER)[0] == [1 * EXPERTS + 0]


def test_half_of_what_it_fetches_is_used_where_use_is_skewed(registry):
    trace = GOLDEN["sparse"].events
    result = simulate(trace, "lru", "50%", "eam", registry=registry)
    without = simulate(trace, "lru", "50%", registry=registry)
    assert result.prefetch_hits > 0
    assert result.misses < without.misses


def test_options(registry):
    policy = registry.create("prefetch", {"kind": "eam", "lead": 2})
    assert policy.lead == 2
    with pytest.raises(ConfigError, match="keep"):
        registry.create("prefetch", {"kind": "eam", "keep": 0})
