"""``fluxmoe cache``: the page files in a folder, and the option ``--store`` that makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import ROOT, fails, here, succeeds
from tests.stores.test_tiers import PAGES, filled, in_file, page_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with page files, complete, incomplete and of version 1, and with other files."""
    folder = tmp_path / "pages"
    filled(in_file(folder)).close()
    (whole,) = page_files(folder)
    data = whole.read_bytes()
    (folder / f"{'0' * 16}.pages").write_bytes(data[:8] + b"\1" + data[9:])
    (folder / f"{'f' * 16}.pages").write_bytes(b"x" * 5000)
    (folder / "notes.txt").write_text("not a page file")
    program = (
        "import os; from pathlib import Path; from tests.stores.test_tiers import *;"
        f"store = in_file(Path({str(folder)!r}), weights='second');"
        "store.adopt(layers()[0]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT)
    return folder


def states(folder: Path) -> dict[str, str]:
    rows = json.loads(succeeds("cache", "list", folder, "--json"))
    return {Path(row["path"]).name.partition("-")[0]: row["state"] for row in rows}


def test_list(folder: Path) -> None:
    rows = json.loads(succeeds("cache", "list", folder, "--json"))
    found = {row["state"]: row for row in rows}
    assert set(found) == {
        *("complete", "incomplete", "unsupported version 1", "not a page file"),
    }
    assert (found["complete"]["held"], found["complete"]["pages"]) == (PAGES, PAGES)
    assert found["incomplete"]["held"] == 4 and found["complete"]["codec"] == "fixed4"
    assert found["complete"]["bytes"] > 100_000
    shown = succeeds("cache", "list", folder)
    assert "12 of 12" in shown and "4 of 12" in shown and "notes" not in shown
    assert succeeds("cache", "list", folder, "--csv").count("\n") == 5
    assert succeeds("cache", "list", folder / "none") == "no page files\n"
    fails("cache", "list", folder / "notes.txt", code="FM307", message="Not a directory")


def test_a_file_that_is_being_written_is_kept(folder: Path) -> None:
    store = in_file(folder, weights="third")
    store.claim(0)
    assert sorted(states(folder).values()).count("being written") == 1
    assert "being written" not in succeeds("cache", "prune", folder, "--all")
    assert list(states(folder).values()) == ["being written"]
    filled(store).close()
    assert list(states(folder).values()) == ["complete"]


def test_verify_finds_damage_and_sets_the_file_aside(folder: Path) -> None:
    (whole,) = (path for path in page_files(folder) if states(folder).get(path.name) == "complete")
    assert f"{whole}: 12 pages, ok" in succeeds("cache", "verify", folder)
    with whole.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"damage")
    done = here("cache", "verify", folder)
    assert done.returncode == 1
    assert f"{whole}: 1 damaged: part 0 of page 0 is damaged" in done.stdout
    assert not whole.exists() and whole.with_suffix(".damaged").exists()


def test_prune_keeps_files_of_other_users_and_files_locked_in_the_meantime(folder: Path) -> None:
    from fluxmoe.stores.disk import catalogue

    if os.geteuid():
        pytest.skip("needs root")
    (whole,) = (path for path in page_files(folder) if states(folder).get(path.name) == "complete")
    os.chown(whole, 12345, 12345)
    (entry,) = (each for each in catalogue.entries(folder) if each.state == "incomplete")
    store = in_file(folder, weights="second")  # continues the file
    store.claim(0)
    assert not catalogue.remove(entry) and entry.path.exists()
    store.close()
    succeeds("cache", "prune", folder, "--all")
    assert [path.name for path in page_files(folder)] == [whole.name, "notes.txt"]


def test_prune_keeps_files_and_folders_that_are_not_fluxmoes(folder: Path) -> None:
    others = "letter.pages", "movie.mkv.part", "car.damaged", f"{'0' * 17}.pages"
    for name in others:
        (folder / name).write_bytes(b"x")
    (folder / f"{'1' * 16}.damaged").mkdir()
    succeeds("cache", "prune", folder, "--all")
    assert not states(folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {*others, f"{'1' * 16}.damaged", "notes.txt"}


def test_prune_removes_what_cannot_be_used(folder: Path) -> None:
    before = states(folder)
    assert "would remove" in succeeds("cache", "prune", folder, "--dry-run")
    assert states(folder) == before
    assert succeeds("cache", "prune", folder).count("removed ") == 3
    assert list(states(folder).values()) == ["complete"]
    assert (folder / "notes.txt").exists()
    assert succeeds("cache", "prune", folder, "--all").count("removed ") == 1
    assert not states(folder)


def test_generate_keeps_experts_in_the_users_cache(tmp_path: Path, monkeypatch) -> None:
    from fluxmoe.demo.model import SHIPPED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pages = tmp_path / "fluxmoe" / "pages"
    command = ["generate", SHIPPED, "--prompt", "Once", "--memory", "8MiB", "--max-new-tokens", "4"]
    told = succeeds(*command, "--json")
    on_disk = succeeds(*command, "--store", "file", "--json")
    assert json.loads(told)["token_ids"] == json.loads(on_disk)["token_ids"]
    assert list(states(pages).values()) == ["complete"]
    (path,) = page_files(pages)
    before = path.stat().st_mtime_ns
    succeeds(*command, "--store", pages)
    assert path.stat().st_mtime_ns == before
    fails(*command, "--store", "", code="FM101", message="--store.*host, file or a folder")
    if os.geteuid():
        fails(*command, "--store", "/proc/x", code="FM101", message="cannot write")


def test_files_that_count_as_room_may_vanish_or_be_unfinished(tmp_path: Path, monkeypatch) -> None:
    from fluxmoe import config, machine
    from fluxmoe.backends import stores
    from fluxmoe.errors import ConfigError

    monkeypatch.setattr(machine, "free_disk", lambda _: 1000)
    kept = config.parse(
        {"memory": {"budget": "1GiB"}, "stores": [{"kind": "file", "path": str(tmp_path)}]},
        where="",
    )
    (tmp_path / f"{'0' * 16}.pages").symlink_to(tmp_path / "nowhere")
    (tmp_path / "movie.mkv.part").write_bytes(bytes(9000))
    with pytest.raises(ConfigError, match="has room for only 1000 B"):
        stores.require_room(kept, 5000)
    (tmp_path / f"{'1' * 16}-b.part").write_bytes(bytes(4000))  # the next start continues it
    stores.require_room(kept, 5000)
