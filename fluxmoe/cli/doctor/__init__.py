"""``fluxmoe doctor``: check this installation, and give a remedy for each problem."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fluxmoe import dimensions, machine
from fluxmoe.arguments import require_new
from fluxmoe.cli.doctor import checks, kernels
from fluxmoe.cli.doctor.checks import Check
from fluxmoe.cli.shared import hardware, output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson, Force, stores
from fluxmoe.demo.model import SHIPPED
from fluxmoe.errors import ConfigError, MissingDependencyError


def doctor(
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Measure this machine and write a hardware profile to this file.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to use for the measurement; default: the shipped model."),
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            metavar="host|file|FOLDER",
            help="With --measure: where all experts are kept; the disk of a page file is measured.",
        ),
    ] = "host",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Skip the kernel checks, which must import the engines and are slow."
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """Check this installation; exit with status 2 if an essential part is broken."""
    if measure is not None:
        require_new(measure, replace=force, by="--force")
        stores(store)
        _measure(measure, model or str(SHIPPED), store, as_json, as_csv)
        return
    if model is not None or store != "host":
        raise ConfigError(
            "only a measurement uses --model and --store", where="doctor", fix="give --measure FILE"
        )
    system = list(checks.system())
    backends = list(checks.backends()) if sys.platform == "linux" else []
    broken = any(finding.status == "broken" for finding in system)
    engines = {finding.name.partition(",")[0] for finding in backends if finding.status == "ok"}
    with kernels.running(sorted(engines) if not quick else []) as wait:
        if not (as_json or as_csv):
            _print("This installation", system)
            _print("Backends", backends)
            if engines and not quick:
                output.warn("checking MoE kernels, up to half a minute; --quick skips this")
        checked = wait()
    tables = {
        "checks": [asdict(finding) for finding in system],
        "backends": [asdict(finding) for finding in backends],
        "kernels": [asdict(check) for check in checked],
    }
    rows = ({"table": name, **row} for name in tables for row in tables[name])
    if not output.printed(as_json, as_csv, {"ok": not broken, **tables}, rows) and checked:
        _print(f"MoE kernels: {machine.processor()}", [_kernel(check) for check in checked])
    if broken:
        sys.exit(2)


def _measure(path: Path, model: str, store: str, as_json: bool, as_csv: bool) -> None:
    """Write a hardware profile of this machine for ``--hardware``."""
    problem = checks.first_problem(checks.package("torch"), checks.package("transformers"))
    if problem is not None:
        raise MissingDependencyError(
            f"{problem.name}: {problem.found}", where="--measure", fix=problem.fix
        )
    from fluxmoe.backends.torch.measure import measure
    from fluxmoe.sim.hardware import Profile, save

    profile = Profile(**measure(model))
    profile = hardware.with_store(profile, store, dimensions.read(model).page_bytes)
    save(profile, path)
    data = profile.model_dump()
    if not output.printed(as_json, as_csv, data, [data]):
        print(f"{path}: {profile.description}")
        print(f"a page is loaded at {profile.load_gbps:.1f} GB/s + {profile.load_us:.0f} µs")
        print(f"a step takes {profile.step_us:.0f} µs + {profile.token_us:.1f} µs per token and")
        print(f"layer; experts are read at {profile.memory_gbps:.1f} GB/s")


def _kernel(check: kernels.KernelCheck) -> Check:
    name = f"{check.engine}: {check.kernel or 'MoE kernel'} {check.dtype}".rstrip()
    if check.same:
        return Check(name, "ok", f"same bits in any slots, {check.milliseconds:.0f} ms")
    return Check(name, "note", check.problem, check.fix)


def _print(title: str, findings: list[Check]) -> None:
    """Print findings, and below them the remedies as whole lines, which can be copied."""
    rows = [(finding.name, finding.status, finding.found) for finding in findings]
    table.show(title, ["", "status", "found"], [], rows, merge=False)
    for finding in findings:
        if finding.fix:
            output.say(f"• {finding.name}: {finding.fix}")
