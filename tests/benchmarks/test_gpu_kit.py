"""The parts of the GPU kit that work without a GPU: collecting, rejecting and printing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bring, command, device

LIBRARY = "class Wheel:\n    works = True\n"


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Make a wheel that pip accepts for Linux on x86-64."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-cp312-cp312-manylinux_2_17_x86_64.whl"
    about = f"{name}-1.0.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        b"Tag: cp312-cp312-manylinux_2_17_x86_64\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as file:
        for at, content in files.items():
            file.writestr(at, content)
    return path


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Make two wheels to download; one contains a large file to omit and a file to install."""
    noise = bytes(torch.randint(0, 256, (200_000,), dtype=torch.uint8).tolist())
    wheel(tmp_path / "shelf", "alpha", {"alpha.py": LIBRARY.encode(), "alpha_data.bin": noise})
    wheel(
        tmp_path / "shelf",
        "beta",
        {
            "beta/__init__.py": b"",
            "beta/huge.so": noise * 3,
            "beta-1.0.data/platlib/beta/extra.py": b"here = 1",
            "beta-1.0.data/scripts/run": b"#!python",
        },
    )
    return tmp_path / "shelf"


def collect(shelf: Path, into: Path, *extra: str) -> None:
    offline = ["--pip=--no-index", f"--pip=--find-links={shelf}"]
    bring.main(["collect", f"--into={into}", *offline, *extra])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = bring.Set(("alpha", "beta"), ("*/huge.so",))
    monkeypatch.setattr(bring, "SETS", {"kernels": wanted})


def test_what_is_collected_works_where_it_is_unpacked(few, shelf, tmp_path, capsys) -> None:
    pieces, site = tmp_path / "pieces", tmp_path / "site"
    collect(shelf, pieces, "--piece=64KiB")
    names = sorted(path.name for path in pieces.glob("archive*"))
    assert len(names) >= 3 and max(path.stat().st_size for path in pieces.iterdir()) <= 64 << 10
    assert json.loads((pieces / "manifest.json").read_text())["wheels"] == sorted(
        path.name for path in shelf.iterdir()
    )

    # On the GPU machine: a plain Python, without FluxMoE.
    script = Path(bring.__file__)
    done = subprocess.run(
        [sys.executable, "-I", script, "unpack", f"--from={pieces}", f"--into={site}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and f"PYTHONPATH={site}" in done.stdout, done.stderr
    assert (site / "alpha.py").read_text() == LIBRARY
    assert (site / "beta/extra.py").read_text() == "here = 1"
    assert not (site / "beta/huge.so").exists() and not list(site.rglob("run"))
    assert (site / "alpha-1.0.dist-info/METADATA").exists()


def test_collecting_again_leaves_no_old_piece(few, shelf, tmp_path) -> None:
    pieces = tmp_path / "pieces"
    collect(shelf, pieces, "--piece=64KiB")
    collect(shelf, pieces, "--piece=1MiB")
    assert [path.name for path in pieces.glob("archive*")] == ["archive.tar.xz.000"]


@pytest.mark.parametrize("damage", ["bit", "missing", "short", "swapped", "manifest"])
def test_damaged_pieces_are_refused(few, shelf, tmp_path, damage) -> None:
    pieces, site = tmp_path / "pieces", tmp_path / "site"
    collect(shelf, pieces, "--piece=64KiB")
    first, second = (pieces / f"archive.tar.xz.00{n}" for n in range(2))
    content = bytearray(first.read_bytes())
    if damage == "bit":
        content[1000] ^= 1
        first.write_bytes(content)
    elif damage == "short":
        first.write_bytes(content[:-1])
    elif damage == "missing":
        first.unlink()
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        (pieces / "manifest.json").write_text("[]")
    says = {"missing": "missing", "manifest": "not a manifest"}.get(damage, "damaged")
    with pytest.raises(SystemExit, match=says):
        bring.main(["unpack", f"--from={pieces}", f"--into={site}"])
    assert not site.exists()


def test_pieces_in_another_order_are_refused(few, shelf, tmp_path) -> None:
    pieces = tmp_path / "pieces"
    collect(shelf, pieces, "--piece=64KiB")
    path = pieces / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["pieces"] = dict(reversed(manifest["pieces"].items()))
    path.write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="do not form"):
        bring.main(["unpack", f"--from={pieces}", f"--into={tmp_path / 'site'}"])


def test_without_pieces_it_says_what_to_do(tmp_path) -> None:
    with pytest.raises(SystemExit, match="run `collect`"):
        bring.main(["unpack", f"--from={tmp_path}"])


def test_what_cannot_be_downloaded_is_said(monkeypatch, shelf, tmp_path) -> None:
    monkeypatch.setattr(bring, "SETS", {"kernels": bring.Set(("gamma",))})
    with pytest.raises(SystemExit, match="pip could not download"):
        collect(shelf, tmp_path / "pieces")


@pytest.mark.parametrize("text", ["65MiB", "0MiB", "32", "-1MiB", "1GiB", "much"])
def test_pieces_of_silly_sizes_are_refused(text, capsys) -> None:
    with pytest.raises(SystemExit):
        bring.main(["collect", f"--piece={text}"])
    assert "is not a size like 32MiB" in capsys.readouterr().err


def test_versions_are_those_of_the_lock() -> None:
    pins = bring.pins(bring.LOCK)
    assert pins["pydantic-core"] and pins["typing-inspection"]
    assert set(map(bring.normal, bring.SETS["kernels"].requirements)) <= set(pins)


EXPERIMENTS = sorted(set(command.COMMANDS) - {"collect", "unpack"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_without_a_gpu_every_experiment_says_so(name, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main([name])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error[FM402]: this experiment needs a GPU") and said.count("\n") == 1


def test_commands_are_listed_and_others_refused(capsys) -> None:
    command.main([])
    listed = capsys.readouterr().out
    assert all(f"\n  {name}" in listed for name in command.COMMANDS)
    with pytest.raises(SystemExit, match="no command of the kit is called 'kernels'"):
        command.main(["kernels"])


def test_every_command_has_its_module() -> None:
    for name in EXPERIMENTS:
        assert importlib.util.find_spec(f"benchmarks.gpu.{name}")


def test_the_table(capsys) -> None:
    rows = [
        {"shape": "tiny", "us": 1234.567, "vllm": None, "identical": True},
        {"shape": "huge", "us": 0.00012345, "vllm": 2.5, "identical": False},
    ]
    device.show("results", rows)
    out = capsys.readouterr().out
    assert "results" in out and "1235" in out and "0.0001234" in out and "–" in out and "NO" in out
    device.show("nothing", [])


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER $*"
case "$1" in --tool={bad}) echo "========= ERROR SUMMARY: 3 errors"; exit 99;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def sanitizer(monkeypatch, tmp_path):
    """Make a fake compute-sanitizer that finds an error with the given tool."""

    def put(bad: str) -> None:
        monkeypatch.setattr(device, "require", lambda: torch.device("cpu"))
        path = tmp_path / "compute-sanitizer"
        path.write_text(SANITIZER.replace("{bad}", bad))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return put


def test_sanitizer_clean(sanitizer, capsys) -> None:
    sanitizer("none")
    command.main(["sanitize", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(row["status"] == 0 and "0 errors" in row["summary"] for row in rows)


def test_sanitizer_with_findings(sanitizer, capsys) -> None:
    sanitizer("initcheck")
    with pytest.raises(SystemExit, match="found something"):
        command.main(["sanitize", "--tool=memcheck", "--tool=initcheck"])
    out, err = capsys.readouterr()
    assert "3 errors" in out and "benchmarks gpu check" in err


def test_no_sanitizer(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(device, "require", lambda: torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        command.main(["sanitize"])
    assert "error[FM404]: compute-sanitizer is not on PATH" in capsys.readouterr().err
