"""``import fluxmoe`` is light: plugins and scripts import only what they use."""

from __future__ import annotations

import subprocess
import sys

#: Packages that commands, backends and the simulator need, but policies do not.
HEAVY = ("llvmlite", "numba", "prometheus_client", "psutil", "pyarrow", "pydantic", "rich",
         "safetensors", "torch", "transformers", "typer", "vllm", "yaml")  # fmt: skip


def imported(program: str) -> tuple[set[str], dict[str, int]]:
    """Run a program in a fresh interpreter; return imported packages and µs spent on each."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"{program}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    spent: dict[str, int] = {}
    for line in done.stderr.splitlines():
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            package = name.strip().partition(".")[0]
            spent[package] = spent.get(package, 0) + int(own)
    return {name.partition(".")[0] for name in done.stdout.split()}, spent


def test_import_fluxmoe_is_light() -> None:
    packages, spent = imported("import fluxmoe")
    assert {"fluxmoe", "numpy", "pluggy"} <= packages
    assert packages.isdisjoint(HEAVY)
    assert set(spent) >= {"fluxmoe", "numpy", "pluggy"}
    assert set(spent).isdisjoint(HEAVY)


def test_the_test_sees_what_is_imported() -> None:
    packages, spent = imported("import fluxmoe.config")
    assert "pydantic" in packages
    assert spent["pydantic"] > 0
