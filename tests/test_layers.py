"""The import contracts forbid everything that the design forbids; folders and files are small.

Import-linter reads a graph of imports. Here, imports that violate the design are added to copies of
that graph, one to each copy, and the corresponding contract must fail. One test writes such an
import to disk.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
from importlinter.application import use_cases
from importlinter.configuration import configure
from importlinter.domain.contract import registry

import fluxmoe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fluxmoe.__file__).parent

GROUND = {"types", "owner"}
#: Folder of the core → folders that it may import.
CORE: dict[str, set[str]] = {
    "types": set(),
    "owner": set(),
    "compiled": GROUND,
    "transfer": GROUND,
    "memory": GROUND | {"compiled", "transfer"},
    "policy": GROUND | {"compiled", "transfer"},
    "paging": GROUND | {"compiled", "transfer", "memory", "policy"},
    "arbitration": GROUND | {"compiled", "transfer", "memory", "policy", "paging"},
}
#: The whole package: each line may import the lines below it.
PACKAGES = (
    ("cli",),
    ("demo", "plan", "testing"),
    ("backends", "sim", "observe"),
    ("plugins", "trace", "cuda"),
    ("policies", "stores", "config", "draw"),
    ("dimensions",),
    ("hookspecs", "checkpoint"),
    ("inventory",),
    ("core",),
    ("arguments", "caches", "findings", "machine"),
    ("sizes",),
    ("errors",),
    ("words",),
)
LEVEL = {name: level for level, names in enumerate(PACKAGES) for name in names}
CONTRACTS_OF_POLICIES = {"core.types", "core.policy.paging", "core.policy.arbitration"}

MOST_MODULES, MOST_LINES = 14, 350


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("fluxmoe", include_external_packages=True)


@pytest.fixture(scope="module")
def contracts() -> dict[str, Any]:
    configure()
    options = use_cases.read_user_options(str(ROOT / "pyproject.toml"))
    use_cases._register_contract_types(options)
    return {
        each["id"]: registry.get_contract_class(each["type"])(
            name=each["name"], session_options=options.session_options, contract_options=each
        )
        for each in options.contracts_options
    }


@pytest.fixture
def kept(graph, contracts):
    """Make a function that returns True if a contract holds when one module imports another."""

    def check(contract: str, importer: str, imported: str) -> bool:
        probed = copy.deepcopy(graph)
        for module in importer, imported:
            if module not in probed.modules:
                probed.add_module(module, is_squashed=not module.startswith("fluxmoe"))
        probed.add_import(importer=importer, imported=imported)
        return bool(contracts[contract].check(probed, verbose=False).kept)

    return check


def probe_in(folder: str) -> str:
    """Return the name of a module in ``fluxmoe.<folder>``, or this name if it is a module."""
    path = PACKAGE / folder.replace(".", "/")
    return f"fluxmoe.{folder}.probe" if path.is_dir() else f"fluxmoe.{folder}"


def test_all_contracts_hold(graph, contracts):
    broken = [n for n, c in contracts.items() if not c.check(copy.deepcopy(graph), False).kept]
    assert not broken


@pytest.mark.parametrize("importer", CORE)
def test_rooms_of_the_core_import_what_the_design_says_and_nothing_else(kept, importer):
    for imported in CORE.keys() - {importer}:
        allowed = imported in CORE[importer]
        modules = probe_in(f"core.{importer}"), probe_in(f"core.{imported}")
        assert kept("core-layers", *modules) is allowed, imported


@pytest.mark.parametrize("importer", LEVEL)
def test_packages_import_lower_ones_and_nothing_else(kept, importer):
    for imported in LEVEL.keys() - {importer}:
        allowed = LEVEL[importer] < LEVEL[imported]
        modules = probe_in(importer), probe_in(imported)
        assert kept("package-layers", *modules) is allowed, imported


def test_an_engine_does_not_import_the_simulator_by_a_detour_either(kept):
    assert not kept("engines-without-simulator", "fluxmoe.backends.torch.probe", "fluxmoe.sim")
    assert not kept("engines-without-simulator", "fluxmoe.trace.format", "fluxmoe.sim.hardware")


def modules_of(graph: grimp.ImportGraph, folder: str) -> Iterator[str]:
    for module in sorted(graph.modules):
        if module.startswith(f"fluxmoe.{folder}."):
            yield module.removeprefix("fluxmoe.")


def test_policies_see_their_contracts_only(graph, kept):
    rooms = [f"core.{room}" for room in CORE]
    for module in {*rooms, *modules_of(graph, "core")}:
        allowed = module in CONTRACTS_OF_POLICIES
        name = "policies-see-the-contract-only", "fluxmoe.policies.probe", f"fluxmoe.{module}"
        assert kept(*name) is allowed, module


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("vllm", {"backends.vllm.probe", "backends.vllm.worker.probe"}),
        ("triton", {"cuda.kernels.language"}),
        ("pytest", {"testing.probe", "testing.conformance.probe"}),
        ("hypothesis", {"testing.probe", "testing.conformance.probe"}),
    ],
)
def test_a_library_is_imported_in_its_own_folder_only(kept, library, allowed):
    contract = {
        "vllm": "vllm-only-below-its-backend",
        "triton": "triton-only-in-kernels",
    }.get(library, "pytest-only-in-testing")
    everywhere = {probe_in(name).removeprefix("fluxmoe.") for name in LEVEL}
    for module in allowed | everywhere | {"backends.torch.probe", "cuda.kernels.probe"}:
        assert kept(contract, f"fluxmoe.{module}", library) is (module in allowed), module


def test_the_core_is_pure(kept):
    for library in ("pluggy", "prometheus_client", "pyarrow", "pydantic", "rich", "safetensors",
                    "torch", "transformers", "triton", "typer", "vllm", "yaml"):  # fmt: skip
        for room in CORE:
            assert not kept("core-is-pure", probe_in(f"core.{room}"), library)


@pytest.mark.parametrize(
    ("contract", "module"),
    [("package-layers", "fluxmoe.annex"), ("core-layers", "fluxmoe.core.annex")],
)
def test_every_folder_has_a_layer(graph, contracts, contract, module):
    probed = copy.deepcopy(graph)
    probed.add_module(module)
    assert not contracts[contract].check(probed, verbose=False).kept


def test_a_module_on_disk_that_breaks_a_contract_is_reported(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fluxmoe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    probe = tmp_path / "fluxmoe/core/compiled/probe.py"
    probe.write_text("from fluxmoe.core.arbitration.controller import Arbiter\n")
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache", "--no-logo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fluxmoe.core.compiled is not allowed to import fluxmoe.core.arbitration" in done.stdout
    assert re.search(r"7 kept, 1 broken", done.stdout)


def test_folders_are_small_enough_to_be_looked_over():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder.relative_to(PACKAGE)


def test_files_of_the_core_are_short_enough_to_be_read():
    for path in (PACKAGE / "core").rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, f"{path.relative_to(PACKAGE)} has {lines} lines"


def test_no_class_name_is_used_twice() -> None:
    """Names are unique, so that searching for a name finds one class."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if "templates" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
