"""The packages below ``plugins``: built as wheels, installed beside fluxmoe's wheel, and tested."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests import fresh
from tests.fresh import do

ROOT = Path(__file__).parents[2]
PACKAGES = sorted((ROOT / "plugins").glob("fluxmoe-*"))
NAMES = [package.name.removeprefix("fluxmoe-") for package in PACKAGES]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    return fresh.build(tmp_path_factory.mktemp("wheels"), [ROOT, *PACKAGES])


@pytest.fixture(scope="module")
def python(wheels, tmp_path_factory) -> Path:
    return fresh.install(tmp_path_factory.mktemp("fresh"), wheels)


def test_the_wheel_has_the_template_the_types_and_the_fixtures(wheels):
    [wheel] = [wheel for wheel in wheels if wheel.name.startswith("fluxmoe-0")]
    names = zipfile.ZipFile(wheel).namelist()
    assert "fluxmoe/py.typed" in names
    assert "_fluxmoe_pytest.py" in names
    for file in (ROOT / "fluxmoe/templates/plugin").rglob("*"):
        if file.is_file():
            assert str(file.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith(("tests/", "plugins/"))]


@pytest.mark.parametrize("package", PACKAGES, ids=NAMES)
def test_a_package_passes_its_tests_beside_the_wheel(package, python, tmp_path):
    # Run outside the checkout, so that the installed package is tested.
    for test in (package / "tests").iterdir():
        if test.suffix == ".py":
            (tmp_path / test.name).write_text(test.read_text())
    printed = do(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert " passed" in printed
    where = do(python, "-c", "import fluxmoe; print(fluxmoe.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])


def test_all_of_them_are_found_and_conform(python, tmp_path):
    fluxmoe = python, "-c", "from fluxmoe.cli import main; main()"
    rows = json.loads(do(*fluxmoe, "policies", "--json", cwd=tmp_path))
    found = {row["plugin"]: row for row in rows if row["origin"] == "installed"}
    assert set(found) == set(NAMES) - {"zstd"}  # a codec is not a policy
    assert {row["version"] for row in found.values()} == {"0.1.0"}
    # Their own tests call the kit; here, the command finds an installed package by name.
    verdicts = json.loads(do(*fluxmoe, "plugin", "check", "sieve", "--json", cwd=tmp_path))
    assert [verdict["conforms"] for verdict in verdicts] == [True]


def test_the_fixtures_come_with_the_wheel(python, tmp_path):
    (tmp_path / "test_fixture.py").write_text(
        "def test_it(fluxmoe_golden, fluxmoe_registry, fluxmoe_no_leaks):\n"
        "    assert fluxmoe_registry.names('eviction')\n"
    )
    printed = do(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert "6 passed" in printed


def test_only_public_names_are_used():
    allowed = {"fluxmoe", "fluxmoe.testing", "fluxmoe.errors", "fluxmoe.sim.simulator",
               "fluxmoe.core.types"}  # fmt: skip
    for package in PACKAGES:
        for file in package.rglob("*.py"):
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].startswith("fluxmoe."):
                    assert words[1] in allowed, f"{file.name}: {line}"
            if file.parent == package:  # the plugin itself, not its tests
                assert "from fluxmoe." not in file.read_text()


def test_the_versions_of_the_packages_are_those_of_their_modules():
    for package in PACKAGES:
        module = package / f"{package.name.replace('-', '_')}.py"
        assert '__version__ = "0.1.0"' in module.read_text()
        assert 'version = "0.1.0"' in (package / "pyproject.toml").read_text()
