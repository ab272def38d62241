"""The cost of a decoding step at each split of a budget: a roofline model for all splits at once.

A step reads the experts that its requests use, the other weights and the requests' KV cache, and
computes with them. Non-resident experts are copied over the link in one of two ways: *on demand*
(the layer waits for its misses) or *ahead* (whole layers are copied while other layers compute, so
only the longer of the two times counts, but all non-resident experts are copied). If a layer uses
more experts than there are slots, the layer runs in waves, and the bound on its loads is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fluxmoe.core.paging.measures import MissRatioCurve, convex_hull
from fluxmoe.dimensions import Model
from fluxmoe.errors import ConfigError
from fluxmoe.sim.events import Events
from fluxmoe.sim.hardware import Profile
from fluxmoe.trace import TraceMeta

Floats = npt.NDArray[np.float64]

#: Approximate maximum number of pages visited for a curve; longer traces are sampled.
_LOOKS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class PlannedWorkload:
    """The load: ``requests`` concurrent requests of up to ``tokens`` tokens each."""

    tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class Splits:
    """Splits of a budget. All arrays have the shape ``[splits]``.

    Attributes:
        slots: Number of resident expert pages.
        requests: Number of concurrent requests, limited by the load and the KV cache.
        seconds: Duration of a step in seconds.
        waits: Part of a step that layers spend waiting for experts, in seconds.
        ahead: True if copying whole layers ahead is faster.
    """

    slots: npt.NDArray[np.int64]
    requests: npt.NDArray[np.int64]
    seconds: Floats
    waits: Floats
    ahead: npt.NDArray[np.bool_]

    @property
    def tokens_per_s(self) -> Floats:
        return self.requests / self.seconds


def even_curve(pages: int) -> Floats:
    """Return the miss ratio for 0 … ``pages`` slots if all experts are equally likely.

    A policy that keeps its pages does at least as well: with memory for x% of the pages, its hit
    rate is at least x%.
    """
    curve: Floats = np.linspace(1.0, 0.0, pages + 1)
    return curve


def traced_curve(events: Events, model: Model) -> Floats:
    """Return the miss ratio for 0 … ``pages`` slots in a trace: the convex hull of LRU's curve.

    Raises:
        ConfigError: The trace is from a model with a different shape.
    """
    require_shape(events.meta, model)
    every = 1 + len(events) * model.pages // _LOOKS
    curve = MissRatioCurve(model.pages, model.experts, every=every, window=0)
    last_use = np.full(model.pages, -1, np.int64)
    for index, (_, layer, _, where) in enumerate(events):
        ids = events.ids[where]
        curve.observe(last_use, layer, ids)
        last_use[layer * model.experts + ids] = index
    return convex_hull(curve.curve())


def require_shape(meta: TraceMeta, model: Model) -> None:
    """Raise ConfigError unless a trace has the layers and experts of the model."""
    if (meta.num_layers, meta.experts_per_layer) != (model.moe_layers, model.experts):
        raise ConfigError(
            f"the trace has {meta.num_layers} layers x {meta.experts_per_layer} experts, "
            f"but the model has {model.moe_layers} x {model.experts}",
            where="--trace",
            fix="record a trace of this model: fluxmoe trace record",
        )


def splits(
    model: Model,
    profile: Profile,
    work: PlannedWorkload,
    memory: int,
    slots: npt.NDArray[np.int64],
    curve: Floats,
) -> Splits:
    """Evaluate splits of ``memory`` bytes: ``slots`` for experts, the rest for the KV cache.

    Args:
        model, profile, work: The model, the machine and the load.
        memory: Bytes for experts and KV cache.
        slots: Number of slots in each split; each leaves room for at least one request.
        curve: Miss ratio for each number of slots from 0 to all pages.
    """
    each = model.request_bytes(work.tokens)
    room = (memory - slots * model.page_bytes) // max(each, 1)
    requests = np.clip(room, 1, work.requests)
    # Every token is assumed to use top_k experts of a layer, independently of other tokens.
    share = 1 - (1 - model.top_k / model.experts) ** requests
    used = model.pages * share
    read = used * model.page_bytes + model.read_bytes + requests * each
    paired = model.moe_layers * model.top_k * model.page_bytes + model.read_bytes
    reading = read / (profile.memory_gbps * 1e9)
    computing = requests * (2 * paired / profile.weight_bytes / (profile.tflops * 1e12))
    busy = np.maximum(reading, computing) if profile.roofline else reading + computing
    busy = busy + profile.step_us * 1e-6
    busy += model.layers * (profile.layer_us + requests * profile.token_us) * 1e-6

    page, call = model.page_bytes / (profile.load_gbps * 1e9), profile.load_us * 1e-6
    layer = model.experts * share  # pages that a layer uses
    pairs, kept = requests * model.top_k, slots - model.top_k
    waves = np.minimum(pairs, kept + pairs * (layer - kept) / layer)  # as in waves.most_loads
    missed = np.where(layer > slots, model.moe_layers * waves, used * curve[slots])
    demanded = busy + missed * page + np.minimum(missed, model.moe_layers) * call
    copied = np.maximum(busy, (model.pages - slots) * (page + call))
    copied = np.where(slots < model.experts, np.inf, copied)  # no room for a whole layer
    seconds = np.minimum(demanded, copied)
    return Splits(slots, requests, seconds, seconds - busy, copied < demanded)
