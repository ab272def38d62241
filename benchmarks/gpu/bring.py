"""Collect the packages that a GPU machine without a network lacks, and unpack them there.

    here:   python -m benchmarks gpu collect [--set kernels|vllm] [--piece 32MiB] [--into DIR]
    there:  python benchmarks/gpu/bring.py unpack [--from DIR] [--into SITE]

``collect`` downloads wheels for that machine's Python, omits unneeded files, and packs the rest
into one compressed archive, split into pieces, with a manifest of their SHA-256 digests. ``unpack``
rejects missing or damaged pieces and needs only Python: run as a file, this module does not import
FluxMoE. After unpacking, setting ``PYTHONPATH=SITE`` is sufficient.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECES, SITE = Path("benchmarks/gpu/pieces"), Path("benchmarks/gpu/site")
LOCK = Path("requirements/cpu.lock")
MANIFEST, ARCHIVE = "manifest.json", "archive.tar.xz"
LARGEST = 64 << 20


@dataclass(frozen=True)
class Set:
    """Requirements to download, and the files to omit from their wheels."""

    requirements: tuple[str, ...]
    leave_out: tuple[str, ...] = ()


#: Packages that are missing on a machine with Python 3.12, torch 2.11 for CUDA 13, Triton 3.6,
#: transformers, numba and pyarrow. The set "vllm" has not been used there yet.
SETS = {
    "kernels": Set(("pydantic", "pydantic_core", "typing-inspection", "annotated-types")),
    "vllm": Set(
        (
            "vllm==0.26.0", "pydantic", "pydantic_core", "typing-inspection", "annotated-types",
            "pydantic-settings", "pydantic-extra-types", "python-dotenv", "fastapi", "starlette",
            "uvicorn", "msgspec", "pyzmq", "cachetools", "cbor2", "pybase64",
            "compressed-tensors", "depyf", "astor", "dill", "openai", "distro", "jiter", "anyio",
            "sniffio", "openai-harmony", "xgrammar", "llguidance", "lark", "outlines_core",
            "diskcache", "interegular", "lm-format-enforcer", "apache-tvm-ffi",
            "partial-json-parser",
            "blake3", "setproctitle", "watchfiles", "prometheus-fastapi-instrumentator",
            "python-json-logger", "gguf", "mistral_common", "ijson", "mcp", "httpx-sse",
            "sse-starlette", "python-multipart", "jsonschema", "jsonschema-specifications",
            "referencing", "rpds-py", "model-hosting-container-standards", "loguru",
        ),
        (
            "vllm/_flashmla*", "vllm/_deep_gemm*", "vllm/third_party/deep_gemm/*",
            "vllm/vllm_flash_attn/_vllm_fa2*", "vllm/_rust*", "*/tests/*",
        ),
    ),
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("gpu", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("collect", help="download and pack")
    there.add_argument("--set", choices=SETS, default="kernels", help="set of packages to collect")
    there.add_argument("--into", type=Path, default=PIECES, metavar="DIR")
    there.add_argument("--piece", type=size, default=32 << 20, help="at most 64MiB")
    there.add_argument("--python", default="3.12", metavar="VERSION", help="Python of that machine")
    there.add_argument("--lock", type=Path, default=LOCK, help="lock file with preferred versions")
    there.add_argument("--pip", action="append", default=[], metavar="OPTION", help="pip option")
    back = commands.add_parser("unpack", help="check and unpack")
    back.add_argument("--from", dest="pieces", type=Path, default=PIECES, metavar="DIR")
    back.add_argument("--into", type=Path, default=SITE, metavar="SITE")
    options = parser.parse_args(argv)
    if options.command == "collect":
        wanted = SETS[options.set]
        with tempfile.TemporaryDirectory() as folder:
            download(wanted.requirements, Path(folder), options.python, options.lock, options.pip)
            names = pack(Path(folder), options.into, options.piece, wanted.leave_out)
        total = sum((options.into / name).stat().st_size for name in names)
        print(f"{len(names)} pieces, {total / 2**20:.1f} MiB, in {options.into}")
    else:
        count = unpack(options.pieces, options.into)
        print(f"{count} files in {options.into}; now: export PYTHONPATH={options.into}")


def size(text: str) -> int:
    """Parse sizes such as ``32MiB``."""
    found = re.fullmatch(r"(\d+) ?(KiB|MiB)", text)
    nbytes = int(found[1]) << {"KiB": 10, "MiB": 20}[found[2]] if found else 0
    if not 0 < nbytes <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 32MiB, up to 64MiB")
    return nbytes


def download(
    requirements: tuple[str, ...], into: Path, python: str, lock: Path, options: list[str]
) -> None:
    """Download wheels for x86-64 Linux and CPython ``python``, in the locked versions if listed."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in range(5, 40)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", f"--dest={into}"]
    command += [f"--platform={platform}" for platform in platforms]
    versions = pins(lock)
    for requirement in requirements:
        pin = versions.get(normal(requirement))
        command.append(f"{requirement}=={pin}" if pin else requirement)
    if subprocess.run([*command, *options]).returncode:
        sys.exit("pip could not download these wheels; see above")


def pins(lock: Path) -> dict[str, str]:
    """Map each normalised name in a lock file to its version."""
    lines = re.findall(r"^([\w.-]+)==([\w.]+)", lock.read_text(), re.M)
    return {normal(name): version for name, version in lines}


def normal(name: str) -> str:
    """Normalise a distribution's name as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pack(wheels: Path, into: Path, piece: int, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Unpack the wheels into one archive and split it; return the names of the pieces, in order."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob(f"{ARCHIVE}.*"):
        old.unlink()
    names, digests, whole = [], [], hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        site, archive = Path(folder) / "site", Path(folder) / ARCHIVE
        for wheel in sorted(wheels.glob("*.whl")):
            _extract(wheel, site, leave_out)
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(site, ".")
        with archive.open("rb") as file:
            while block := file.read(piece):
                name = f"{ARCHIVE}.{len(names):03d}"
                (into / name).write_bytes(block)
                names.append(name)
                digests.append(hashlib.sha256(block).hexdigest())
                whole.update(block)
    manifest = {
        "pieces": dict(zip(names, digests, strict=True)),
        "archive": whole.hexdigest(),
        "wheels": sorted(wheel.name for wheel in wheels.glob("*.whl")),
    }
    (into / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return names


def _extract(wheel: Path, site: Path, leave_out: tuple[str, ...]) -> None:
    """Extract the files that an installation would put into site-packages."""
    with zipfile.ZipFile(wheel) as file:
        for item in file.infolist():
            if any(fnmatch.fnmatch(item.filename, pattern) for pattern in leave_out):
                continue
            parts = Path(item.filename).parts
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    continue  # omit scripts and manuals
                item.filename = "/".join(parts[2:])
            file.extract(item, site)


def unpack(pieces: Path, into: Path) -> int:
    """Check and unpack all pieces; return the number of files."""
    try:
        manifest = json.loads((pieces / MANIFEST).read_text())
        digests, whole = manifest["pieces"], manifest["archive"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{pieces / MANIFEST} is not a manifest ({error!r}): run `collect` again")
    for name, digest in digests.items():
        try:
            found = hashlib.sha256((pieces / name).read_bytes()).hexdigest()
        except OSError as error:
            sys.exit(f"a piece is missing: {error}")
        if found != digest:
            sys.exit(f"{pieces / name} is damaged: bring it again")
    with tempfile.NamedTemporaryFile(suffix=".tar.xz") as archive:
        for block in _blocks(pieces, digests):
            archive.write(block)
        archive.seek(0)
        if hashlib.file_digest(archive, "sha256").hexdigest() != whole:
            sys.exit("the pieces do not form the archive: collect them again")
        archive.seek(0)
        with tarfile.open(fileobj=archive, mode="r:xz") as tar:
            members = tar.getmembers()
            tar.extractall(into, members, filter="data")
    return sum(member.isfile() for member in members)


def _blocks(pieces: Path, names: dict[str, str]) -> Iterator[bytes]:
    for name in names:
        yield (pieces / name).read_bytes()


if __name__ == "__main__":
    main(sys.argv[1:])
