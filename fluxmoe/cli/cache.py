"""``fluxmoe cache``: list, verify and remove page files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxmoe import sizes
from fluxmoe.cli.shared import output, table
from fluxmoe.cli.shared.options import AsCsv, AsJson

if TYPE_CHECKING:
    from fluxmoe.stores.disk.catalogue import Entry

app = typer.Typer(help="List, verify and remove page files.", no_args_is_help=True)

Folder = Annotated[
    Path | None,
    typer.Argument(help="Folder of page files; default: fluxmoe/pages in the user's cache folder."),
]


@app.command("list")
def show(folder: Folder = None, as_json: AsJson = False, as_csv: AsCsv = False) -> None:
    """List the page files in a folder."""
    found = _entries(folder)
    rows = [_row(entry) for entry in found]
    if output.printed(as_json, as_csv, rows, rows):
        return
    if not found:
        print("no page files")
        return
    table.show(
        "",
        ["file", "state", "codec", "packing"],
        ["pages", "size", "age"],
        [
            [
                *(entry.path.name, entry.state, entry.codec, entry.packing),
                f"{entry.held} of {entry.pages}" if entry.pages else "",
                sizes.shown(entry.nbytes),
                _age(entry),
            ]
            for entry in found
        ],
    )


@app.command()
def verify(folder: Folder = None) -> None:
    """Read all pages of all complete files, and compare their checksums.

    Files with damaged pages are renamed, so that the next start rebuilds them. The status is 1 if
    a file is damaged.
    """
    from fluxmoe.stores.disk import catalogue

    wrong = False
    for entry in _entries(folder):
        if entry.state == "complete":
            faults = [fault for fault in catalogue.damage(entry) if fault]
            wrong = wrong or bool(faults)
            result = f"{len(faults)} damaged: {faults[0]}" if faults else f"{entry.held} pages, ok"
        else:
            result = entry.state
        print(f"{entry.path}: {result}")
    if wrong:
        sys.exit(1)


@app.command()
def prune(
    folder: Folder = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all page files.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove page files that cannot be used: damaged, incomplete, or of another version.

    Files that another process is writing, and files of other users, are kept. A server that uses a
    removed file keeps running.
    """
    from fluxmoe.stores.disk import catalogue

    freed = 0
    for entry in _entries(folder):
        if not entry.useless and not (everything and entry.state == "complete"):
            continue
        if not dry_run and not catalogue.remove(entry):
            continue
        freed += entry.nbytes
        print(f"{'would remove' if dry_run else 'removed'} {entry.path} ({entry.state})")
    print(f"{sizes.shown(freed)} {'would be ' if dry_run else ''}freed")


def _entries(folder: Path | None) -> list[Entry]:
    from fluxmoe import caches
    from fluxmoe.stores.disk import catalogue

    return catalogue.entries(caches.own("pages") if folder is None else folder)


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "state": entry.state,
        "codec": entry.codec,
        "packing": entry.packing,
        "held": entry.held,
        "pages": entry.pages,
        "bytes": entry.nbytes,
        "modified": entry.modified,
    }


def _age(entry: Entry) -> str:
    hours = max(time.time() - entry.modified, 0) / 3600
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
