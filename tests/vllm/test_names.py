"""Each name in vLLM and transformers that FluxMoE uses gives a clear error if it is renamed."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

import fluxmoe.backends
from fluxmoe.backends.names import Names, _assigned
from fluxmoe.backends.torch.names import NAMES as TRANSFORMERS
from fluxmoe.backends.vllm.names import NAMES as VLLM
from fluxmoe.errors import UnsupportedVersionError

pytestmark = pytest.mark.vllm

FOLDER = Path(fluxmoe.backends.__file__).parent
LIBRARIES = {"vllm": VLLM, "transformers": TRANSFORMERS}
ALL = [
    pytest.param(names, part, name, id=name)
    for names in LIBRARIES.values()
    for part, table in names.table.items()
    for name in table
    if not name.endswith("Role.SCHEDULER")  # a member cannot be removed from an enumeration
]
CALLED = [row for row in ALL if row.values[0].table[row.values[1]][row.values[2]]]

#: FluxMoE class that inherits from a vLLM class → part of the table with the vLLM class.
OVERRIDING = {
    "compat.loading:StreamingLoader": "loading",
    "connector:PagingConnector": "connector",
    "connector:StepMetadata": "connector",
    "connector:WorkerIntroduction": "connector",
    "connector:WorkerMetadata": "connector",
    "stats:PagingStats": "connector",
    "server.prometheus:PagingProm": "connector",
    "scheduler.balloon:BalloonPool": "connector",
    "worker.cpu:PagedCPUWorker": "cpu",
    "worker.layer:PagedRoutedExperts": "worker",
    "worker.weights.streamed:StreamedMoEMethod": "worker",
    "half_configured:GuardedLogitsProcessor": "plugin",
}


def owners(name: str) -> tuple[list[Any], str]:
    """Find the possible owners of a name (a module, or classes), and the name's last part."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    *heads, last = path.split(".")
    for head in heads:
        found = getattr(found, head)
    if inspect.ismodule(found):
        return [found], last
    return list((found if inspect.isclass(found) else type(found)).__mro__), last


def rename(patch: pytest.MonkeyPatch, name: str) -> None:
    found, last = owners(name)
    for each in found:
        fields = vars(each).get("__dataclass_fields__", {})
        if last in fields:
            patch.delitem(fields, last)
        if last in vars(each):
            patch.delattr(each, last)
        if inspect.isclass(each) and last in _assigned(each) and "__init__" in vars(each):
            code = inspect.unwrap(each.__init__).__code__
            names = tuple("gone" if name == last else name for name in code.co_names)
            init = FunctionType(code.replace(co_names=names), {}, closure=each.__init__.__closure__)
            patch.setattr(each, "__init__", init)
    if inspect.ismodule(found[0]):  # a lazy module would find the name again
        module = found[0]
        lazy = module if "__getattr__" in vars(module) else type(module)
        if lazy is not ModuleType:
            before = lazy.__getattr__

            def without(*args: Any) -> Any:
                if args[-1] == last:
                    raise AttributeError(last)
                return before(*args)

            patch.setattr(lazy, "__getattr__", without)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_installed_version_has_them_all(library: str) -> None:
    for part in LIBRARIES[library].table:
        LIBRARIES[library].require(part)


@pytest.mark.parametrize(("names", "part", "name"), ALL)
def test_a_name_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, names: Names, part: str, name: str
) -> None:
    rename(monkeypatch, name)
    with pytest.raises(UnsupportedVersionError) as caught:
        names.require(part)
    version = importlib.import_module(names.package).__version__
    assert caught.value.what == f"{names.package} {version} has no {name}"


@pytest.mark.parametrize(("names", "part", "name"), CALLED)
def test_a_parameter_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, names: Names, part: str, name: str
) -> None:
    (found, *_), last = owners(name)
    if inspect.isclass(getattr(found, last)):
        kind = getattr(found, last)
        monkeypatch.setattr(kind, "__signature__", inspect.Signature(), raising=False)
    else:
        monkeypatch.setattr(found, last, lambda self: None)
    with pytest.raises(UnsupportedVersionError, match="it has"):
        names.require(part)


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, paths in VLLM.on.items() for path in paths]
)
def test_an_attribute_that_is_gone(kind: str, path: str) -> None:
    def build(without: str | None) -> SimpleNamespace:
        thing = SimpleNamespace()
        for each in VLLM.on[kind]:
            *owners, last = each.split(".")
            found = thing
            for name in owners:
                found.__dict__.setdefault(name, SimpleNamespace())
                found = getattr(found, name)
            if each != without:
                setattr(found, last, None)
        return thing

    VLLM.require_on(kind, build(None))
    with pytest.raises(UnsupportedVersionError, match=rf"{kind}\.{path}"):
        VLLM.require_on(kind, build(path))


#: Module of a backend → its syntax tree.
TREES = {file: ast.parse(file.read_text()) for file in FOLDER.rglob("*.py")}


def imported(library: str) -> Iterator[str]:
    """List the names that backend modules import from a library, as ``module:name``."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_table_has_what_is_imported(library: str) -> None:
    table = {name for part in LIBRARIES[library].table.values() for name in part}
    modules = {name.partition(":")[0] for name in table}
    classes = {f"{name.partition(':')[0]}:{name.partition(':')[2].split('.')[0]}" for name in table}
    missing = {
        name
        for name in imported(library)
        if name not in classes and name.replace(":", ".") not in modules
    }
    # vLLM's public API, and a name used only in annotations.
    assert missing <= {"vllm:LLM", "vllm.config:VllmConfig"}


@pytest.mark.parametrize("ours", OVERRIDING)
def test_the_table_has_what_is_overridden(ours: str) -> None:
    module, _, name = ours.partition(":")
    kind = getattr(importlib.import_module(f"fluxmoe.backends.vllm.{module}"), name)
    theirs = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "vllm"]
    table = {entry.rpartition(".")[2] for entry in VLLM.table[OVERRIDING[ours]]}
    overridden = {
        attribute
        for attribute in vars(kind)
        if not attribute.startswith("__")
        and attribute != "_abc_impl"
        and any(attribute in vars(base) for base in theirs)
    }
    assert overridden <= table | {"name"}, overridden - table


def test_every_class_that_overrides_is_listed() -> None:
    theirs = {name.partition(":")[2] for name in imported("vllm")}
    found = {
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if theirs & {base.id for base in node.bases if isinstance(base, ast.Name)}
    }
    assert found == {name.partition(":")[2] for name in OVERRIDING}


#: Unqualified name of a class or module in vLLM → its attributes in the table.
KNOWN: dict[str, set[str]] = {}
for _name in [name for part in VLLM.table.values() for name in part]:
    _owner, _, _last = _name.replace(":", ".").rpartition(".")
    KNOWN.setdefault(_owner.rpartition(".")[2], set()).add(_last)
for _kind, _paths in VLLM.on.items():
    for _path in _paths:
        KNOWN.setdefault(_kind.rpartition(" ")[2], set()).update(_path.split("."))


@pytest.mark.parametrize("ours", OVERRIDING)
def test_the_table_has_what_a_subclass_uses_of_itself(ours: str) -> None:
    module, _, name = ours.partition(":")
    kind = getattr(importlib.import_module(f"fluxmoe.backends.vllm.{module}"), name)
    theirs = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == "vllm"]
    inherited = {each for base in theirs for each in (*vars(base), *_assigned(base))}
    (tree,) = (
        node
        for node in ast.walk(TREES[Path(inspect.getfile(kind))])
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    table = {each for base in theirs for each in KNOWN.get(base.__name__, ())}
    assert {each for each in used & inherited if not each.startswith("__")} <= table


def uses(code: str, theirs: set[str]) -> set[tuple[str, str]]:
    """Collect the uses of names that code imports from vLLM.

    Args:
        code: The source code.
        theirs: Names that the ``compat`` modules import from vLLM.

    Returns:
        For an attribute of such a name, the name and the attribute; for an attribute of the result
        of a call, "" and the attribute; for a keyword argument, the function and the keyword
        followed by ``=``.
    """
    tree = ast.parse(code)
    names = theirs & {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        if (node.module or "").startswith(("vllm", "fluxmoe.backends.vllm.compat"))
        for alias in node.names
    }

    def is_call(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in names

    results = {  # a variable is assumed to hold such a result in the whole module
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_call(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value
            if isinstance(of, ast.Name) and of.id in names:
                found.add((of.id, node.attr))
            elif is_call(of) or (isinstance(of, ast.Name) and of.id in results):
                found.add(("", node.attr))
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function.partition(".")[0] in names:
                found |= {(function, f"{each.arg}=") for each in node.keywords if each.arg}
    return found


def test_every_use_of_an_imported_name_is_in_the_table() -> None:
    theirs = {name.partition(":")[2] for name in imported("vllm") if not name.startswith("vllm:")}
    passed = {}
    for part in VLLM.table.values():
        for name, parameters in part.items():
            *_, owner, last = name.replace(":", ".").split(".")
            passed |= {last: parameters.split(), f"{owner}.{last}": parameters.split()}
    found = {use for file in TREES for use in uses(file.read_text(), theirs)}
    assert len(found) > 15
    known = {"": set().union(*KNOWN.values()), **KNOWN}
    assert {
        (owner, name)
        for owner, name in found
        if name not in known.get(owner, ()) and name.rstrip("=") not in passed.get(owner, ())
    } == set()


def test_uses_of_imported_names_are_found() -> None:
    code = (
        "from vllm.x import f, K\nfrom os import path\n"
        "def g(c):\n    a = f(c)\n    a.b, f(c).d, K.e(c, h=1), f(i=2), c.j, path.k, K\n"
    )
    want = {("", "b"), ("", "d"), ("K", "e"), ("K.e", "h="), ("f", "i=")}
    assert uses(code, {"f", "K"}) == want


#: Attribute → class of vLLM's configuration that it holds.
CONFIGS = {
    f"{name}_config": kind
    for name, kind in {
        "vllm": "VllmConfig",
        "cache": "CacheConfig",
        "load": "LoadConfig",
        "model": "ModelConfig",
        "parallel": "ParallelConfig",
        "scheduler": "SchedulerConfig",
        "kv_transfer": "KVTransferConfig",
    }.items()
}
#: Attribute or variable in the scheduler's modules → class of the vLLM object that it holds.
HELD = {
    **{"_manager": "KVCacheManager", "manager": "KVCacheManager", "request": "Request"},
    **{"_pool": "BlockPool", "pool": "BlockPool", "block": "KVCacheBlock"},
}


def reads(code: str, variables: dict[str, str]) -> set[str]:
    """Collect, as ``Class.attribute``, the attributes of vLLM's objects that code reads."""
    held = {**CONFIGS, **variables}
    found: set[str] = set()
    for function in ast.walk(ast.parse(code)):
        if not isinstance(function, ast.FunctionDef):
            continue
        called = {"vllm_config": "VllmConfig", **variables}  # variable → class
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                targets = [each.id for each in node.targets if isinstance(each, ast.Name)]
                called |= {name: held.get(node.value.attr, "") for name in targets}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                of = node.value
                kind = held.get(of.attr) if isinstance(of, ast.Attribute) else None
                kind = called.get(of.id) if isinstance(of, ast.Name) else kind
                if kind:
                    found.add(f"{kind}.{node.attr}")
    return found


def test_every_attribute_that_is_read_is_in_the_table() -> None:
    read = {}
    for path in (FOLDER / "vllm").rglob("*.py"):
        scheduler = path.parent.name == "scheduler" or path.name == "connector.py"
        for name in reads(path.read_text(), HELD if scheduler else {}):
            read[name] = path.name
    assert len(read) > 30
    known = {f"{kind}.{name}" for kind, names in KNOWN.items() for name in names}
    own = {"BlockPool.held_blocks", "BlockPool.__class__"}
    assert {name: file for name, file in read.items() if name not in known | own} == {}


def test_reads_are_found() -> None:
    code = (
        "def f(c):\n    load = c.vllm_config.load_config\n    return load.x, c.model_config.y, c.z"
    )
    assert reads(code, HELD) == {"VllmConfig.load_config", "LoadConfig.x", "ModelConfig.y"}
    code = "def f(self, request):\n    pool = self._manager.a\n    return pool.b, request.c, self.d"
    assert reads(code, HELD) == {"KVCacheManager.a", "Request.c"}
