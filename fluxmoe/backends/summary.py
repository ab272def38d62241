"""The text that an engine logs at startup: the paged model, its memory, and the policies."""

from __future__ import annotations

from collections.abc import Sequence

from fluxmoe import sizes
from fluxmoe.backends.partition import Partition
from fluxmoe.config import Resolved
from fluxmoe.config.schema import FileStoreConfig, HostStoreConfig
from fluxmoe.plugins import Registry
from fluxmoe.version import __version__


def start_block(
    part: Partition,
    config: Resolved,
    *,
    model: str,
    top_k: int | None,
    dynamic: bool,
    registry: Registry,
    store_bytes: int,
    more: Sequence[tuple[str, str]] = (),
) -> str:
    """Compose a text of a headline, followed by lines with a name and a value each.

    Args:
        part: The budget of a worker and its initial split.
        config: The configuration.
        model: Name of the model.
        top_k: Number of experts per token; None if unknown.
        dynamic: True if the split may change while the engine serves.
        registry: The registry that created the policies.
        store_bytes: Size of the stored pages in bytes.
        more: Further names and values from the engine.
    """
    geometry, slots = part.geometry, sum(part.slots)
    policies = {"eviction": config.eviction, "prefetch": config.prefetch}
    if dynamic:
        policies["arbitration"] = config.arbitration
    lines = [
        ("budget", _budget(part, dynamic)),
        ("slots", f"{slots} of {geometry.num_pages} pages, in {_count(part.banks, 'bank')}"),
        *((kind, registry.source(kind, policy)) for kind, policy in policies.items()),
        ("stores", f"{', '.join(map(_store, config.stores))}: {sizes.shown(store_bytes)}"),
        *more,
    ]
    cycle = geometry.num_layers * (top_k or 0)
    if slots < min(cycle, geometry.num_pages):
        lines.append(
            (
                "note",
                f"the slots are fewer than the {cycle} pages that a token uses ({top_k} in each "
                "layer), so a policy such as lru would never hit",
            )
        )
    headline = (
        f"FluxMoE {__version__} pages the experts of {model}: "
        f"{_count(geometry.num_layers, 'layer')} of {geometry.experts_per_layer}, "
        f"{sizes.shown(part.page_class.nbytes)} each"
    )
    return "\n".join([headline, *(f"  {name:<12} {value}" for name, value in lines)])


def _budget(part: Partition, dynamic: bool) -> str:
    frame = part.frame_bytes
    total, experts = sizes.shown(part.frames * frame), sizes.shown(part.experts.target * frame)
    if not part.kv.target:
        return f"{total} for experts"
    split = f"{total} per worker: experts {experts}, KV cache {sizes.shown(part.kv.target * frame)}"
    if not dynamic:
        return f"{split}; the split is fixed"
    least, most = (sizes.shown(count * frame) for count in (part.experts.min, part.experts.max))
    return f"{split}; while serving, experts {least} to {most}"


def _store(store: HostStoreConfig | FileStoreConfig) -> str:
    words: list[str] = [store.kind]
    if isinstance(store, FileStoreConfig):
        words.append(str(store.folder))
    if store.codec["kind"] != "none":
        words.append(f"with {store.codec['kind']}")
    if store.limit is not None:
        words.append(f"up to {sizes.shown(store.limit)}")
    return " ".join(words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
