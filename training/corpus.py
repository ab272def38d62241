"""Fetch the packages of the shipped model's corpus, and build training and held-out text from them.

    python training/corpus.py --out FOLDER

Five packages of Debian 12, pinned by version and checksum, are fetched with ``apt-get download``.
The result is the same, byte for byte, on every x86-64 machine. (The program ``bible``, which reads
the Bible's text format, is an x86-64 binary.) The text is not kept in the repository.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

#: SHA-256 and name of each package's file.
PACKAGES = """
75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d  bible-kjv_4.38_amd64.deb
d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a  bible-kjv-text_4.38_all.deb
df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95  r-cran-janeaustenr_1.0.0-1_all.deb
17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb  jargon-text_4.4.7-4.1_all.deb
5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be  python3.11-doc_3.11.2-6+deb12u9_all.deb
"""  # noqa: E501
#: Parts of Python's documentation that are mostly prose.
PYTHON_PARTS = ("tutorial", "howto", "faq", "reference", "using", "extending")
#: One document in this many is held out, chosen by its checksum.
HELD_OUT = 24
PLAIN = str.maketrans("‘’“”–—…\u00a0·", "''\"\"--.\u0020.")


def fetch(folder: Path) -> None:
    """Download and unpack every package into ``folder/NAME``.

    Raises:
        RuntimeError: A package file does not match its checksum.
    """
    for line in PACKAGES.split("\n")[1:-1]:
        checksum, file_name = line.split()
        name, version, _ = file_name.split("_")
        file = folder / file_name
        if not file.is_file():
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=folder, check=True)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != checksum:
            raise RuntimeError(f"{file.name} has SHA-256 {found}, not {checksum}")
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder / name)], check=True)


def bible(folder: Path) -> Iterator[str]:
    """Yield one document per chapter, with one line per verse."""
    reader = folder / "bible-kjv/usr/bin/bible"
    data = folder / "bible-kjv-text/usr/lib"
    done = subprocess.run(
        [str(reader), "-f", "-p", str(data), "gen1:1-rev22:21"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    chapter, verses = "", list[str]()
    for line in done.stdout.decode("latin-1").splitlines():
        found = re.match(r"(\w+?\d+):\d+ (.*)", line)
        if not found:
            continue
        if found[1] != chapter and verses:
            yield "\n".join(verses)
            verses = []
        chapter = found[1]
        verses.append(found[2].strip())
    yield "\n".join(verses)


def austen(folder: Path) -> Iterator[str]:
    """Yield one document per chapter of the six novels, with one line per paragraph.

    The novels are character vectors in R's lazy-load format: compressed records of strings, each
    with a tag, a length and its bytes.
    """
    data = folder / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    index = gzip.decompress((data / "Rdata.rdx").read_bytes())
    packed = (data / "Rdata.rdb").read_bytes()
    # The index is a list of integer pairs: offset and length of a record.
    for pair in re.finditer(rb"\x00{3}\x0d\x00{3}\x02(.{8})", index, re.DOTALL):
        start, length = struct.unpack(">II", pair[1])
        record = zlib.decompress(packed[start + 4 : start + length])
        at = record.index(b"\0\0\0\x10") + 8
        lines = []
        for _ in range(struct.unpack(">I", record[at - 4 : at])[0]):
            size = struct.unpack(">i", record[at + 4 : at + 8])[0]  # after the string's own tag
            lines.append(record[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield from re.split(r"\n(?=chapter )", paragraphs(lines), flags=re.IGNORECASE)


def jargon(folder: Path) -> Iterator[str]:
    """Yield one document per 20 entries of the Jargon File, with one line per paragraph."""
    file = folder / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz"
    text = paragraphs(gzip.decompress(file.read_bytes()).decode().splitlines())
    # Omit the table of contents, which the split turns into one "entry" of thousands of lines.
    entries = [
        entry
        for entry in re.split(r"\n(?=:)", text)
        if entry.startswith(":") and len(entry) > 60 and entry.count("\n") < 100
    ]
    for first in range(0, len(entries), 20):
        yield "\n".join(entries[first : first + 20])


def python_docs(folder: Path) -> Iterator[str]:
    """Yield the source text of Python's documentation, in documents of about 8,000 characters."""
    root = folder / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for part in PYTHON_PARTS:
        for file in sorted((root / part).rglob("*.rst.txt")):
            text = ""
            for block in file.read_text().split("\n\n"):
                text += block + "\n\n"
                if len(text) > 8000:
                    yield text
                    text = ""
            yield text


def paragraphs(lines: list[str]) -> str:
    """Join wrapped lines into one line per paragraph."""
    joined = re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines))
    return "\n".join(" ".join(part.split()) for part in joined if part.strip())


SOURCES = {"bible": bible, "austen": austen, "jargon": jargon, "python": python_docs}


def build(folder: Path) -> dict[str, dict[str, int]]:
    """Write ``train-SOURCE.txt`` and ``held-SOURCE.txt``; a NUL byte separates documents."""
    sizes = {}
    for name, documents in SOURCES.items():
        parts: dict[str, list[bytes]] = {"train": [], "held": []}
        for document in documents(folder):
            text = (document.translate(PLAIN).strip() + "\n").encode()
            held = hashlib.sha256(text).digest()[0] % HELD_OUT == 0
            parts["held" if held else "train"].append(text)
        for part, texts in parts.items():
            (folder / f"{part}-{name}.txt").write_bytes(b"\0".join(texts))
        sizes[name] = {part: sum(map(len, texts)) for part, texts in parts.items()}
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for packages and text")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    fetch(out)
    print(json.dumps(build(out), indent=1))
