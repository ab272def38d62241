"""Container limits (A4): faked and real memory cgroups (both versions), shared memory, disks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxmoe import config, machine
from fluxmoe.backends import budget
from fluxmoe.errors import ConfigError
from tests.commandline import here

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a file system root for a machine with 24 GiB of memory, 20 GiB of which is free."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    found = SimpleNamespace(total=24 * GIB, available=20 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: found)
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def in_cgroup(root: Path, version: int, own: str, mounted: str = "/") -> Path:
    """Fake this process's memory cgroup; return the mount point of the tree."""
    controller, kind, option = {
        1: ("4:memory:", "cgroup", "rw,memory"),
        2: ("0::", "cgroup2", "rw"),
    }[version]
    top = "sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup"
    write(root / "proc/self/cgroup", f"5:cpu:/else\n{controller}{own}")
    write(
        root / "proc/self/mountinfo",
        f"20 1 0:2 / /proc rw - proc proc rw\n"
        f"30 23 0:28 {mounted} /{top} rw,relatime shared:9 - {kind} {kind} {option}\n"
        f"31 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
    )
    return root / top


def limited(folder: Path, version: int, limit: object, used: int, cache: int = 0) -> None:
    names = ("memory.max", "memory.current", "") if version == 2 else (
        *("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_")  # fmt: skip
    write(folder / names[0], limit)
    write(folder / names[1], used)
    write(
        folder / "memory.stat",
        f"file 1\n{names[2]}inactive_file {cache // 2}\n{names[2]}active_file {cache // 2}",
    )


def test_a_machine_without_cgroups(root: Path) -> None:
    assert machine.memory() == machine.MemoryRoom(24 * GIB, 20 * GIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a4_the_limit_of_the_own_cgroup_less_its_use(root: Path, version: int) -> None:
    top = in_cgroup(root, version, "/pod/app")
    limited(top / "pod/app", version, 2 * GIB, GIB)
    folder = f"/{(top / 'pod/app').relative_to(root)}"
    assert machine.memory() == machine.MemoryRoom(2 * GIB, GIB, folder)


@pytest.mark.parametrize("version", [1, 2])
def test_a4_page_cache_can_be_reclaimed(root: Path, version: int) -> None:
    top = in_cgroup(root, version, "/app")
    limited(top / "app", version, 2 * GIB, 2 * GIB, cache=GIB)
    assert machine.memory().available == GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a4_a_limit_of_an_outer_cgroup(root: Path, version: int) -> None:
    top = in_cgroup(root, version, "/pod/app")
    limited(top / "pod", version, 2 * GIB, GIB // 2)
    limited(top / "pod/app", version, 3 * GIB, 0)
    found = machine.memory()
    assert (found.total, found.available) == (2 * GIB, GIB * 3 // 2)
    assert found.limit.endswith("/pod")
    # The outer group is larger, but other processes use it.
    limited(top / "pod", version, 4 * GIB, 3 * GIB)
    assert machine.memory().available == GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a4_in_a_container_the_mount_is_the_cgroup_itself(root: Path, version: int) -> None:
    limited(in_cgroup(root, version, "/docker/abc", "/docker/abc"), version, GIB, 0)
    assert machine.memory().total == GIB
    limited(in_cgroup(root, version, "/not/visible"), version, GIB // 2, 0)
    assert machine.memory().total == GIB // 2


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit", ["max", 9223372036854771712, 100 * GIB])
def test_no_limit(root: Path, version: int, limit: object) -> None:
    limited(in_cgroup(root, version, "/"), version, limit, GIB)
    assert machine.memory() == machine.MemoryRoom(24 * GIB, 20 * GIB)


def test_a4_use_beyond_the_limit_leaves_nothing(root: Path) -> None:
    limited(in_cgroup(root, 2, "/"), 2, GIB, 2 * GIB)
    assert machine.memory().available == 0


@pytest.fixture(params=[1, 2])
def two_gib(request: pytest.FixtureRequest, root: Path) -> None:
    """Set a limit of 2 GiB, half of which is in use."""
    limited(in_cgroup(root, request.param, "/app") / "app", request.param, 2 * GIB, GIB)


@pytest.mark.usefixtures("two_gib")
def test_a4_every_reader_uses_the_limit(tmp_path: Path) -> None:
    from fluxmoe.demo.model import SHIPPED

    config = tmp_path / "c.yaml"
    config.write_text(f"model: {SHIPPED}\nmemory: {{budget: auto}}\n")
    done = here("config", "check", str(config))
    weights = sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors"))
    assert f"auto is currently {(GIB - weights) // 2 >> 20}.0 MiB" in done.stdout, done.stderr
    config.write_text(f"model: {SHIPPED}\nmemory: {{budget: 1500MiB}}\n")
    done = here("config", "check", str(config))
    assert done.returncode == 2
    assert "free memory within the limit of /sys/fs/cgroup" in done.stderr
    assert "limited by /sys/fs/cgroup" in here("doctor", "--quick", "--json").stdout


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    """Make a real memory cgroup, limited to 2 GiB; return its folder."""
    place = "memory.max" if Path("/sys/fs/cgroup/memory.max").exists() else "memory.limit_in_bytes"
    folder = next(iter(machine._cgroups()), Path("/nowhere")) / f"fluxmoe-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / place).write_text(str(2 * GIB))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a4_a_real_cgroup(real: Path) -> None:
    program = (
        f"import os; open({str(real / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
        "from fluxmoe import machine; m = machine.memory(); print(m.total, m.available)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    total, available = map(int, done.stdout.split())
    assert total == 2 * GIB
    assert GIB < available < total


def test_a7_shared_memory(root: Path) -> None:
    assert machine.shared_memory() is None
    (root / "dev/shm").mkdir(parents=True)
    free = machine.shared_memory()
    assert free is not None and free > 0


def test_disks(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "not/yet/made") == machine.free_disk(tmp_path)
    assert machine.in_memory(Path("/dev/shm/new")) == (Path("/dev/shm").is_mount())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*Not a directory; here; go there"):
        machine.require_writable(tmp_path / "file/x", where="here", fix="go there")
    machine.require_writable(tmp_path / "a/b", where="", fix="")
    assert (tmp_path / "a/b").is_dir()


@pytest.mark.usefixtures("two_gib")
@pytest.mark.parametrize(
    ("stores", "says"),
    [
        (
            [],
            r"1\.5 GiB is needed \(900\.0 MiB for the budget, .* for experts in the host store, ",
        ),
        ([{"kind": "file", "path": "pages"}], r"is needed \(900\.0 MiB for the budget, 400"),
    ],
)
def test_a4_weights_and_budget_together(stores: list[object], says: str) -> None:
    """1 GiB is free: the budget alone fits, but not together with the weights."""
    given = {"memory": {"budget": "900MiB"}, "stores": stores or [{"kind": "host"}]}
    ready = config.parse(given, where="").resolved(900 << 20)
    budget.require_for_weights(ready, experts=100 << 20, others=10 << 20)
    with pytest.raises(ConfigError, match=says) as caught:
        budget.require_for_weights(ready, experts=200 << 20, others=400 << 20, workers=1)
    assert ("kind: file" in caught.value.fix) == (not stores)
    with pytest.raises(ConfigError, match=r"1\.8 GiB for 2 budgets"):
        budget.require_for_weights(ready, experts=0, others=0, workers=2)
