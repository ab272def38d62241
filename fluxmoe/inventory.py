"""A check that a checkpoint has all its experts, since engines do not detect missing experts.

Engines load the existing weights into uninitialised memory and compute with garbage in place of the
missing weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fluxmoe.errors import CheckpointError

#: Name of a tensor → its shape.
Shapes = dict[str, tuple[int, ...]]

#: Keys of ``config.json`` for the number of experts per layer, by model family.
EXPERTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_moe_experts",
)

#: Keys of ``config.json`` for the number of experts per token.
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k"),
    "moe_k",
)

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.*)")
#: ``mlp.experts.7.up_proj.weight``, quantised or not. ``_NO_WEIGHT`` excludes scales and biases.
_ONE = re.compile(
    r"(?P<path>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>.+)(?P<end>\.(?:q?weight|weight_packed))"
)
#: ``mlp.experts.up_proj`` or ``block_sparse_moe.input_linear.weight``: all experts of a layer.
_ALL = re.compile(
    r"(?P<path>.*\bexperts|.*\bmoe|.*(?=\.(?:in|out)put_linear\.))\.(?P<part>[a-z]\w*?)"
    r"(?P<end>(?:_(?:blocks|packed|q?weight))?(?:\.weight)?)"
)
_NO_WEIGHT = re.compile("scale|bias|zero")
_ROUTER = re.compile(r".*\.(?:gate|router)(?:\.\w+)*\.weight")


class ExpertTensor(NamedTuple):
    """The parsed name of a tensor with expert weights, such as ``mlp.experts.7.up_proj.weight``.

    ``expert`` is None if the tensor contains all experts of its layer.
    """

    stack: str  # model.layers
    layer: int
    path: str  # mlp.experts
    expert: int | None
    part: str  # up_proj
    end: str  # .weight

    @property
    def owner(self) -> str:
        """Name of the module that contains the experts."""
        return f"{self.stack}.{self.layer}.{self.path.removesuffix('.experts')}"


def expert_tensor(name: str, dimensions: int) -> ExpertTensor | None:
    """Parse a tensor's name; return None if the tensor has no expert weights."""
    at = _LAYER.fullmatch(name)
    if at is None or _NO_WEIGHT.search(at["rest"]):
        return None
    one = _ONE.fullmatch(at["rest"])
    what = one or (_ALL.fullmatch(at["rest"]) if dimensions > 2 else None)
    if what is None:
        return None
    expert = int(one["expert"]) if one else None
    return ExpertTensor(
        at["stack"], int(at["layer"]), what["path"], expert, what["part"], what["end"]
    )


def layer_number(name: str) -> int | None:
    """Return the number of the layer in the name of a module or tensor; None if there is none."""
    at = _LAYER.fullmatch(name)
    return None if at is None else int(at["layer"])


def natural(name: str) -> list[tuple[int, str]]:
    """Make a sort key with which layer 2 comes before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


class _Place(NamedTuple):
    """The location of experts in a stack of layers, such as ``mlp.experts`` in ``model.layers``."""

    stack: str
    path: str
    #: True for layers beyond the model's last layer, which belong to speculative decoding.
    beyond: bool


@dataclass(slots=True)
class _Layer:
    """The experts found in one layer."""

    #: Part → experts that have a separate tensor for the part.
    each: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    #: Part → number of experts in the fused tensor of the part.
    fused: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The largest expert index plus one; 0 if there are no experts."""
        return max(*(max(held) + 1 for held in self.each.values()), *self.fused.values(), 0, 0)


@dataclass(slots=True)
class _Found:
    """The experts of a checkpoint and the other tensors of its layers."""

    layers: dict[_Place, dict[int, _Layer]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(_Layer))
    )
    #: (Place, part) → suffix of the tensors' names.
    ends: dict[tuple[_Place, str], str] = field(default_factory=dict)
    rest: dict[str, dict[int, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )


def require_experts(tensors: Shapes, config: Mapping[str, Any], *, where: str) -> None:
    """Reject a checkpoint that lacks experts that its layers must have.

    The number of experts comes from ``config.json``, or else from the largest index found. Layers
    with experts are recognised by their tensors: a layer without experts must have tensors that
    layers with experts lack. Every expert must have the same parts.

    Layers in other stacks, or beyond ``num_hidden_layers``, are compared only with each other.

    Raises:
        CheckpointError: An expert is missing; the message names the layer and the expert.
    """
    depth = config.get("num_hidden_layers")
    found = _sorted(tensors, depth if isinstance(depth, int) else 1 << 30)
    # A draft model or a vision tower has fewer layers than the language model.
    stack = max(found.layers, key=lambda place: len(found.layers[place]), default=_NOWHERE).stack
    for problem in _problems(found, stack, tensors, config):
        raise CheckpointError(problem, where=where, fix="download or copy it again")


_NOWHERE = _Place("", "", False)


def _sorted(tensors: Shapes, depth: int) -> _Found:
    found = _Found()
    for name, shape in tensors.items():
        if (at := _LAYER.fullmatch(name)) is None:
            continue
        index, rest, one = int(at["layer"]), at["rest"], expert_tensor(name, len(shape))
        if one is None:
            if index < depth and not re.search(r"\bexperts\.", rest):
                found.rest[at["stack"]][index].add(rest)
            continue
        place, layer = _Place(one.stack, one.path, index >= depth), found.layers
        found.ends[place, one.part] = one.end
        if one.expert is None:
            layer[place][index].fused[one.part] = shape[0]
        else:
            layer[place][index].each[one.part].add(one.expert)
    return found


def _problems(
    found: _Found, main: str, tensors: Shapes, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield descriptions of missing experts, layer by layer; the caller needs only the first."""
    if not found.layers:
        yield from _nothing(tensors, config)
    for place, layers in sorted(found.layers.items()):
        own = place.stack == main and not place.beyond
        parts = sorted({part for layer in layers.values() for part in (*layer.each, *layer.fused)})
        most = max(layer.count for layer in layers.values())
        rest = found.rest[place.stack]
        usual = set().union(*(rest[index] for index in layers))
        for index in range(max([*rest, *layers]) + 1) if own else sorted(layers):
            head = f"{place.stack}.{index}.{place.path}"
            if index not in layers:
                if not rest[index] - usual:
                    yield f"{head} is missing: the layer has none of its experts"
                continue
            said = _count(config, index) if own else 0
            count, layer = said or most, layers[index]
            for part, rows in sorted(layer.fused.items()):
                if rows != count:
                    told = "config.json says" if said else "other layers have"
                    yield f"{head}.{part} has {rows} experts, but {told} {count}"
            if said and layer.each and layer.count > said:
                yield f"{head} has {layer.count} experts, but config.json says {said}"
            for expert in range(count):
                for part in parts:
                    if part not in layer.fused and expert not in layer.each.get(part, ()):
                        number = f".{expert}" if layer.each else ""
                        yield f"{head}{number}.{part}{found.ends[place, part]} is missing"


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return True if a ``config.json`` mentions several experts, under any key, at any depth."""
    for key, value in config.items():
        if isinstance(value, Mapping) and has_experts(value):
            return True
        if (
            "expert" in str(key)
            and isinstance(value, int)
            and not isinstance(value, bool)
            and value > 1
        ):
            return True
    return False


def _nothing(tensors: Shapes, config: Mapping[str, Any]) -> Iterator[str]:
    """Report routers in a checkpoint without any tensors that could be experts."""
    for name, shape in tensors.items():
        if "expert" in name.replace("shared_expert", "") or (len(shape) > 2 and "conv" not in name):
            return
    for name, shape in sorted(tensors.items()):
        at = _LAYER.match(name) if _ROUTER.fullmatch(name) and len(shape) == 2 else None
        if at and shape[0] == _count(config, int(at["layer"])):
            yield f"all experts of {at['stack']}.{at['layer']} are missing"


def _count(config: Mapping[str, Any], layer: int) -> int:
    """Return the number of experts in a layer according to ``config.json``; 0 if not given."""
    for key in EXPERTS:
        value = config.get(key)
        if isinstance(value, list):  # one number per layer; ignore a list with one per modality
            value = value[layer] if len(value) == config.get("num_hidden_layers") else None
        if isinstance(value, int) and value:
            return value
    return 0
