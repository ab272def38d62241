"""The fake driver compared with the real bindings: names, arguments, numbers and structures.

The tests need ``cuda-bindings``, but neither a GPU nor a driver.
"""

from __future__ import annotations

import ast
import inspect
import re
from enum import IntEnum
from pathlib import Path

import pytest

import fluxmoe
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.cuda.fake import FakeDriver, names

real = pytest.importorskip("cuda.bindings.driver")

FUNCTIONS = sorted(name for name in dir(FakeDriver) if name.startswith("cu"))
TYPES = [
    kind
    for kind in vars(names).values()
    if inspect.isclass(kind) and kind.__module__ == names.__name__
]
ENUMS = [kind for kind in TYPES if issubclass(kind, IntEnum)]
HANDLES = [kind for kind in TYPES if issubclass(kind, names.Handle) and kind is not names.Handle]
STRUCTURES = [
    kind
    for kind in TYPES
    if kind.__name__.startswith("CU") and kind not in ENUMS and kind not in HANDLES
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_same_arguments(name):
    fake = list(inspect.signature(getattr(FakeDriver, name)).parameters)
    assert fake == ["self", *inspect.signature(getattr(real, name)).parameters]


@pytest.mark.parametrize("kind", ENUMS)
def test_numbers_are_the_same(kind):
    for member in kind:
        assert getattr(getattr(real, kind.__name__), member.name) == member


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structures_have_the_same_fields(kind):
    structure = getattr(real, kind.__name__)()
    for field, value in vars(kind()).items():
        ours = getattr(structure, field)
        assert type(ours).__name__ == type(value).__name__, field
        setattr(structure, field, ours)


@pytest.mark.parametrize("kind", HANDLES)
def test_handles_are_numbers_and_equal_only_to_themselves(kind):
    handle = getattr(real, kind.__name__)
    assert int(handle(5)) == int(kind(5)) == 5


def test_a_batch_wants_handles_as_the_fake_does():
    with pytest.raises(TypeError):
        real.cuMemcpyBatchAsync([1], [2], [1], 1, [real.CUmemcpyAttributes()], [0], 1, 0)
    fake = FakeDriver(1)
    with CudaDriver(fake).current(), pytest.raises(TypeError):
        fake.cuMemcpyBatchAsync([1], [2], [1], 1, [fake.CUmemcpyAttributes()], [0], 1, 0)
    fake.close()


#: Prefixes of the names that FluxMoE uses from the bindings.
OURS = re.compile(r"(cu[A-Z]|CU_|CUDA_ERROR_|CU[a-z])\w*[^_]")


def test_whatever_is_taken_from_the_bindings_is_there():
    """Check every name below ``cuda`` that looks like the driver's, including those in strings."""
    words = set()
    for path in Path(fluxmoe.__file__).parent.glob("cuda/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            word = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(word, str) and OURS.fullmatch(word):
                words.add(word)
    assert len(words) > 40
    enums = [kind for kind in vars(real).values() if hasattr(kind, "__members__")]
    assert [
        word
        for word in sorted(words)
        if not any(hasattr(place, word) for place in (real, real.CUresult, *enums))
    ] == []
