"""A clean environment with wheels of this checkout, without downloads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OFFLINE = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")


def environment(**more: str) -> dict[str, str]:
    """Make a set of environment variables without the checkout or a plugin allow-list."""
    hidden = ("PYTHONPATH", "FLUXMOE_PLUGINS", "PYTEST_ADDOPTS")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **more}


def do(*command: object, cwd: Path) -> str:
    """Run a command in ``cwd`` and return its output; raise an error with the output on failure."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path, projects: Sequence[Path]) -> list[Path]:
    """Build the wheels of ``projects``."""
    pip = sys.executable, "-m", "pip", "wheel", *_OFFLINE, "--no-build-isolation"
    do(*pip, "--wheel-dir", folder, *projects, cwd=folder)
    return sorted(folder.glob("*.whl"))


def install(home: Path, wheels: Sequence[Path], *, with_pip: bool = False) -> Path:
    """Make a virtual environment with the wheels and the current packages; return its Python."""
    venv.create(home, with_pip=with_pip)
    python = home / "bin" / "python"
    do(sys.executable, "-m", "pip", "--python", python, "install", *_OFFLINE, *wheels, cwd=home)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(do(python, "-c", where, cwd=home).strip())
    # These folders are last on the path, so that the wheels come first; .pth files there are
    # ignored.
    others = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    take_machine_code(site)
    return python


def take_machine_code(site: Path) -> None:
    """Reuse the checkout's numba machine code for the wheel, to save a minute of compilation.

    Numba identifies a source by modification time and size, so the times are copied.
    """
    for source in (ROOT / "fluxmoe").rglob("*.py"):
        copy = site / source.relative_to(ROOT)
        if copy.exists() and copy.read_bytes() == source.read_bytes():
            os.utime(copy, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    for code in (ROOT / "fluxmoe").rglob("__pycache__/*.nb?"):
        folder = (site / code.relative_to(ROOT)).parent
        if folder.parent.exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(code, folder / code.name)
