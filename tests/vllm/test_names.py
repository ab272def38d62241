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
]
CALLED = [row for row in ALL if row.values[0].table[row.values[1]][row.values[2]]]

#: FluxMoE's class → vLLM's class, by dotted path.
OVERRIDING = {
    "connector:PagingConnector": "connector",
    "stats:PagingStats": "connector",
    "server.prometheus:PagingProm": "connector",
    "scheduler.balloon:BalloonPool": "connector",
    "worker.cpu:PagedCPUWorker": "cpu",
    "worker.layer:PagedRoutedExperts": "worker",
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


def imported(library: str) -> Iterator[str]:
    """List the names that backend modules import from a library, as ``module:name``."""
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
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
    found = set()
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if bases & {
                    *("BlockPool", "CPUWorker", "KVConnectorBase_V1", "KVConnectorPromMetrics"),
                    *("KVConnectorStats", "LogitsProcessor", "RoutedExperts"),
                }:
                    found.add(node.name)
    assert found == {name.partition(":")[2] for name in OVERRIDING}


#: Attribute of vLLM's objects → class of the configuration that the attribute holds.
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


def config_reads(code: str) -> set[str]:
    """Collect, as ``Class.attribute``, the attributes of vLLM's configurations that code reads."""
    found: set[str] = set()
    for function in ast.walk(ast.parse(code)):
        if not isinstance(function, ast.FunctionDef):
            continue
        called = {"vllm_config": "VllmConfig"}  # variable → class
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                targets = [each.id for each in node.targets if isinstance(each, ast.Name)]
                called |= {name: CONFIGS.get(node.value.attr, "") for name in targets}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                of = node.value
                kind = CONFIGS.get(of.attr) if isinstance(of, ast.Attribute) else None
                kind = called.get(of.id) if isinstance(of, ast.Name) else kind
                if kind:
                    found.add(f"{kind}.{node.attr}")
    return found


def test_every_attribute_of_a_configuration_that_is_read_is_in_the_table() -> None:
    table = {name.partition(":")[2] for part in VLLM.table.values() for name in part}
    read = {
        name: path.name
        for path in (FOLDER / "vllm").rglob("*.py")
        for name in config_reads(path.read_text())
    }
    assert len(read) > 15
    assert {name: file for name, file in read.items() if name not in table} == {}


def test_reads_of_configurations_are_found() -> None:
    code = (
        "def f(c):\n    load = c.vllm_config.load_config\n    return load.x, c.model_config.y, c.z"
    )
    assert config_reads(code) == {"VllmConfig.load_config", "LoadConfig.x", "ModelConfig.y"}
