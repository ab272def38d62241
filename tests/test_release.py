"""The release: sdist and wheel, built, compared, and installed in a clean environment."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fluxmoe
from tests import fresh

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

slow = pytest.mark.slow


def do(*command: object, cwd: Path, status: int = 0) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=fresh.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == status, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist of the files known to git, and a wheel from this sdist, as for a release."""
    folder = tmp_path_factory.mktemp("built")
    files = do("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    do(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=folder / "tree")
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    do(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == fluxmoe.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", fluxmoe.__version__)
    newest = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[0] == "Unreleased"
    assert newest[1:2] in ([], [fluxmoe.__version__])


@slow
def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    packed = {name for name in names(wheel) if ".dist-info/" not in name}
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fluxmoe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == here | {"_fluxmoe_pytest.py"}
    assert "fluxmoe/py.typed" in packed


@slow
def test_the_sdist_has_what_tests_and_documentation_need(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    packed = names(sdist)
    tracked = do("git", "ls-files", cwd=ROOT).splitlines()
    left_out = {name for name in tracked if name not in packed and (ROOT / name).exists()}
    assert left_out <= {".ci/run", ".gitignore"} | {n for n in left_out if n.startswith(".")}


@slow
def test_the_metadata_say_what_the_project_says(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    [name] = [name for name in names(wheel) if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(name).decode()
    metadata = message_from_string(text)
    assert (metadata["Name"], metadata["Version"]) == ("fluxmoe", fluxmoe.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert text.endswith((ROOT / "README.md").read_text())


# --- with only the declared dependencies ---------------------------------------------------------


def closure(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Find the distributions that these requirements need, in this environment."""
    seen: set[str] = set()
    todo = [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            assert requirement.marker, f"{name} is required, but not in this environment"
            continue
        if name not in seen:
            seen.add(name)
            yield distribution
            todo += [(Requirement(each), "") for each in distribution.requires or []]


@pytest.fixture(scope="module")
def bare(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Python with the wheel and its declared dependencies, without downloads."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(do(python, "-c", where, cwd=home).strip())
    for distribution in closure(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            origin, link = Path(str(distribution.locate_file(top))), site / top
            if origin.exists() and not link.exists() and top != "__pycache__":
                link.symlink_to(origin)
    [wheel] = built.glob("*.whl")
    quiet = "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"
    do(sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel, cwd=home)
    fresh.take_machine_code(site)
    return home


@slow
def test_the_declared_dependencies_are_enough(bare: Path, tmp_path: Path) -> None:
    command = bare / "bin" / "fluxmoe"
    assert do(command, "--version", cwd=tmp_path) == f"fluxmoe {fluxmoe.__version__}\n"
    size = "--layers", "2", "--experts", "8", "--top-k", "2", "--steps", "20", "--batch", "2"
    do(command, "trace", "synth", *size, "--out", "t.parquet", cwd=tmp_path)
    do(command, "trace", "info", "t.parquet", "--picture", "t.svg", cwd=tmp_path)
    run = command, "simulate", "t.parquet", "--policy", "lru,belady", "--capacity", "50%"
    assert len(json.loads(do(*run, "--json", cwd=tmp_path))) == 2
    (tmp_path / "c.yaml").write_text("memory: {budget: 1GiB}\n")
    do(command, "config", "check", "c.yaml", cwd=tmp_path)
    do(command, "policies", cwd=tmp_path)
    shipped = "from fluxmoe.demo.model import SHIPPED; print(SHIPPED)"
    model = do(bare / "bin" / "python", "-c", shipped, cwd=tmp_path).strip()
    do(command, "plan", model, "--memory", "24MiB", "--json", cwd=tmp_path)
    do(command, "codec", model, cwd=tmp_path)


@slow
def test_what_is_missing_is_explained(bare: Path, tmp_path: Path) -> None:
    python, command = bare / "bin" / "python", bare / "bin" / "fluxmoe"
    missing = "import torch", "import vllm", "import transformers", "import jinja2", "import copier"
    for each in missing:
        assert "ModuleNotFoundError" in do(python, "-c", each, cwd=tmp_path, status=1)
    found = json.loads(do(command, "doctor", "--json", cwd=tmp_path))
    assert found["ok"]
    assert found["kernels"] == []
    checks = {check["name"]: check for check in [*found["checks"], *found["backends"]]}
    for name in ("torch", "vLLM", "transformers"):
        assert checks[name]["status"] == "note"
        assert "pip install" in checks[name]["fix"], name
    do(command, "trace", "synth", "--layers", "2", "--experts", "8", "--top-k", "2", "--steps", "9",
       "--batch", "2", "--out", "t.parquet", cwd=tmp_path)  # fmt: skip
    (tmp_path / "c.yaml").write_text("model: m\nmemory: {budget: 1GiB}\n")
    for words in (
        ("simulate", "t.parquet", "--policy", "lru", "--capacity", "50%", "--report", "r.html"),
        ("generate", "m", "--prompt", "hi"),
        ("generate", "m", "--prompt", "hi", "--backend", "vllm"),
        ("trace", "record", "m", "--prompt", "hi", "--out", "r.parquet"),
        ("plugin", "new", "mine", "--kind", "eviction"),
        ("serve", "c.yaml"),
        ("demo",),
    ):
        printed = do(command, *words, cwd=tmp_path, status=2)
        assert "pip install" in printed, words
        assert "Traceback" not in printed
        assert re.search(r"^error\[FM\d+\]: ", printed, re.MULTILINE), words
    printed = do(python, "-c", "import fluxmoe; fluxmoe.page", cwd=tmp_path, status=1)
    assert "pip install 'fluxmoe[hf]'" in printed


@slow
def test_types_are_found_by_those_who_use_the_wheel(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import fluxmoe\n"
        "code: str = fluxmoe.FluxMoEError('what').code\n"
        "wrong: int = fluxmoe.FluxMoEError('what').code\n"
    )
    python = bare / "bin" / "python"
    printed = do(
        *(sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports=silent"),
        *("--cache-dir", tmp_path / "cache", "mine.py"),
        cwd=tmp_path,
        status=1,
    )
    assert "mine.py:3: error: Incompatible types" in printed
    assert "Found 1 error" in printed
