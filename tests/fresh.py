"""A clean environment with wheels of this checkout; nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OFFLINE = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")


def environment(**more: str) -> dict[str, str]:
    """Nothing of the checkout, and no plugins left out."""
    hidden = ("PYTHONPATH", "FLUXMOE_PLUGINS", "PYTEST_ADDOPTS")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **more}


def do(*command: object, cwd: Path) -> str:
    """Run a command there; what it prints. Fails with its output if it fails."""
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
    """Wheels of projects."""
    pip = sys.executable, "-m", "pip", "wheel", *_OFFLINE, "--no-build-isolation"
    do(*pip, "--wheel-dir", folder, *projects, cwd=folder)
    return sorted(folder.glob("*.whl"))


def install(home: Path, wheels: Sequence[Path], *, with_pip: bool = False) -> Path:
    """A virtual environment that has the wheels, and all else from this one; its interpreter."""
    venv.create(home, with_pip=with_pip)
    python = home / "bin" / "python"
    do(sys.executable, "-m", "pip", "--python", python, "install", *_OFFLINE, *wheels, cwd=home)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(do(python, "-c", where, cwd=home).strip())
    # Last on the path, so that the wheels come first; .pth files over there are not followed.
    others = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return python
