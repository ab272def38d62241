"""Stores that share the pages: every page can be read back from the store that had room for it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import fluxmoe
from fluxmoe import config, plugins
from fluxmoe.backends.stores import make_coders, make_store
from fluxmoe.core.types import Geometry, PageClass, Part
from fluxmoe.errors import CodecError, ConfigError, StoreError
from fluxmoe.stores.coding import Coder
from fluxmoe.stores.disk import pagefile, pagewriter, residency
from fluxmoe.stores.disk.tier import FileTier
from fluxmoe.stores.encoded import HostTier
from fluxmoe.stores.host import HostStore
from fluxmoe.stores.tiers import TieredStore
from tests.stores.weights import bf16

GEOMETRY = Geometry(3, 4)
#: The second part ends within a sector, a line and a word; the third is too short for a block.
PAGE_CLASS = PageClass((Part("w13", 40_960, 20_480), Part("w2", 20_482, 10_241), Part("b", 70, 35)))
PAGES = GEOMETRY.num_pages


def layers(seed: int = 0) -> list[list[np.ndarray]]:
    """Make arrays uint8 ``[experts, part bytes]`` per layer and part."""
    rng = np.random.default_rng(seed)
    shape = lambda part: (GEOMETRY.experts_per_layer, part.elements)  # noqa: E731
    return [
        [bf16(rng.standard_normal(shape(part)) * 0.02).view(np.uint8) for part in PAGE_CLASS.parts]
        for _ in range(GEOMETRY.num_layers)
    ]


def filled(store, seed: int = 0):
    for parts in layers(seed):
        store.adopt(parts)
    return store


def rows() -> list[np.ndarray]:
    return [np.full(part.nbytes, 0xEE, np.uint8) for part in PAGE_CLASS.parts]


def check(store, seed: int = 0) -> None:
    for page in reversed(range(PAGES)):
        store.read_into(page, target := rows())
        layer, expert = divmod(page, GEOMETRY.experts_per_layer)
        for part, row in enumerate(target):
            assert (row == layers(seed)[layer][part][expert]).all()


def store_of(stores: list[dict], weights: str = "first") -> TieredStore | HostStore:
    made = config.parse({"memory": {"budget": "1MiB"}, "stores": stores}, where="test")
    coders = make_coders(made, plugins.load(made.plugins))
    return make_store(made, coders, GEOMETRY, PAGE_CLASS, lambda: {"weights": weights})


@pytest.fixture(params=["host", "file"])
def kind(request, tmp_path: Path) -> dict:
    return {"kind": "host"} if request.param == "host" else {"kind": "file", "path": str(tmp_path)}


@pytest.mark.parametrize("codec", ["none", "fixed4"])
def test_every_page_comes_back_as_it_was_adopted(kind, codec) -> None:
    store = filled(store_of([{**kind, "codec": codec, "limit": "1GiB"}]))
    check(store)
    raw = PAGES * PAGE_CLASS.nbytes
    if kind["kind"] == "host":
        assert store.nbytes / raw < 1.01 if codec == "none" else store.nbytes / raw < 0.78
    store.close()
    store.close()
    assert store.nbytes == 0
    with pytest.raises(StoreError, match="page 0 is not in the store"):
        store.read_into(0, rows())


def test_without_a_codec_or_a_limit_pages_in_host_memory_are_not_copied() -> None:
    assert isinstance(store_of([{"kind": "host"}]), HostStore)
    assert isinstance(store_of([{"kind": "host", "codec": "fixed4"}]), TieredStore)


def test_what_is_adopted_may_change_afterwards(kind) -> None:
    store = store_of([{**kind, "limit": "1GiB"}])
    for parts in layers():
        store.adopt(parts)
        for part in parts:
            part[:] = 0
    check(store)
    store.close()


def test_stores_take_pages_in_order_up_to_their_limits(tmp_path: Path) -> None:
    stores = [
        {"kind": "host", "limit": 3 * 61_632, "codec": "none"},
        {"kind": "host", "limit": 200_000, "codec": "fixed4"},
        {"kind": "file", "path": str(tmp_path), "codec": "fixed4"},
    ]
    store = filled(store_of(stores))
    check(store)
    assert [len(tier._pages) for tier in store._tiers[:2]] == [3, 4]
    assert len(store._tiers[2]._held) == PAGES - 7
    store.close()


def test_pages_that_no_store_has_room_for_are_a_clear_error() -> None:
    store = store_of([{"kind": "host", "limit": 200_000}])
    with pytest.raises(ConfigError, match=r"no store has room for page 3 of 12.*raise a limit"):
        filled(store)


def test_a_layer_of_another_layout_is_refused(kind) -> None:
    store = store_of([{**kind, "limit": "1GiB"}])
    with pytest.raises(StoreError, match="layer 0 has parts of shape"):
        store.adopt(layers()[0][:1])
    filled(store)
    with pytest.raises(StoreError, match="already has all 3 layers"):
        store.adopt(layers()[0])
    store.close()


@pytest.mark.parametrize("page", [-1, PAGES])
def test_a_page_that_is_not_there_is_an_error(kind, page) -> None:
    store = filled(store_of([{**kind, "codec": "fixed4"}]))
    with pytest.raises(StoreError, match=f"page {page} is not in the store"):
        store.read_into(page, rows())
    store.close()


# --- codecs that fail ----------------------------------------------------------------------------


class Faulty(fluxmoe.Codec):
    """A codec that keeps only the first half, which is wrong unless the rest is zero, or fails."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def encode(self, raw):
        if self.fault == "raises":
            raise ZeroDivisionError
        if self.fault == "gives a list":
            return [1, 2]
        return raw[: len(raw) // 2].copy()

    def decode(self, coded, out):
        if self.fault == "raises at decoding":
            raise ZeroDivisionError
        out[: len(coded)] = coded
        out[len(coded) :] = 0


@pytest.mark.parametrize("fault", ["raises", "gives a list", "loses", "raises at decoding"])
def test_a_codec_that_fails_costs_room_but_no_data(fault, caplog) -> None:
    coder = Coder(Faulty(fault), "faulty")
    store = filled(TieredStore(GEOMETRY, PAGE_CLASS, [HostTier(coder, None)]))
    check(store)
    assert coder.faults == PAGES * len(PAGE_CLASS.parts)
    assert caplog.text.count("codec 'faulty' failed") == 1


def test_under_strict_policies_a_codec_that_fails_raises() -> None:
    coder = Coder(Faulty("loses"), "faulty", strict=True)
    with pytest.raises(CodecError, match=r"codec 'faulty' failed: .*does not restore"):
        filled(TieredStore(GEOMETRY, PAGE_CLASS, [HostTier(coder, None)]))


def test_a_codec_that_fails_while_serving_is_named(tmp_path: Path) -> None:
    codec = Faulty("")
    part = np.zeros(100, np.uint8)
    coder = Coder(codec, "faulty")
    kept = coder.encode(part)
    assert len(kept) == 50
    codec.fault = "raises at decoding"
    with pytest.raises(CodecError, match="codec 'faulty' failed: ZeroDivisionError"):
        coder.decode(kept, np.zeros(100, np.uint8))


# --- page files ----------------------------------------------------------------------------------


def page_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def in_file(folder: Path, codec: str = "fixed4", weights: str = "first", **more) -> TieredStore:
    store = store_of([{"kind": "file", "path": str(folder), "codec": codec, **more}], weights)
    assert isinstance(store, TieredStore)
    return store


def test_a_page_file_is_built_once_and_found_again(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "made" / "for it"
    filled(in_file(folder)).close()
    (path,) = page_files(folder)
    before = path.stat()
    store = filled(in_file(folder))
    check(store)
    store.close()
    after = path.stat()
    assert page_files(folder) == [path] and not caplog.records
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_other_weights_codecs_and_layouts_have_files_of_their_own(tmp_path: Path) -> None:
    filled(in_file(tmp_path)).close()
    filled(in_file(tmp_path, codec="none")).close()
    store = filled(in_file(tmp_path, weights="second"), seed=1)
    check(store, seed=1)
    store.close()
    assert len(page_files(tmp_path)) == 3


def test_other_options_of_a_codec_make_another_file(tmp_path: Path) -> None:
    """Some codecs cannot decode data that was encoded with other options."""
    for options in ({}, {"key": 1}, {"key": 2}, {"key": 1}):
        coder = Coder(plugins.load().create("codec", "fixed4"), "fixed4")
        tier = FileTier(GEOMETRY, PAGE_CLASS, tmp_path, coder, None, key=dict, options=options)
        filled(TieredStore(GEOMETRY, PAGE_CLASS, [tier])).close()
    assert len(page_files(tmp_path)) == 3


def test_a_page_that_the_file_has_is_not_looked_at(tmp_path: Path) -> None:
    """The caller may skip such pages, because the key identifies their contents."""
    filled(in_file(tmp_path)).close()
    store = in_file(tmp_path)
    assert all(store.claim(page) for page in range(PAGES))
    store.finish()
    check(store)
    store.close()
    assert not any(in_file(tmp_path, weights="second").claim(page) for page in range(PAGES))


def test_pages_that_a_found_file_lacks_are_kept_beside_it(tmp_path: Path) -> None:
    """A codec that compresses worse than before, for example, leaves less room in earlier tiers."""
    stores = [{"kind": "host", "limit": 200_000}, {"kind": "file", "path": str(tmp_path)}]
    filled(store_of(stores)).close()
    (path,) = page_files(tmp_path)
    before = path.read_bytes()
    store = store_of(stores)
    store._tiers[0]._limit = 100_000
    filled(store)
    check(store)
    store.close()
    assert page_files(tmp_path) == [path] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "the file is truncated"),
        (lambda data: data[: len(data) // 2], "the file is truncated"),
        (lambda data: data[:4100], "the file is truncated"),
        (lambda data: data[:100], "not a page file"),
        (lambda data: b"", "not a page file"),
        (lambda data: b"PK" + data[2:], "not a page file"),
        (lambda data: data[:8] + b"\1" + data[9:], "unsupported version 1"),
        (lambda data: data[:30] + b"x" + data[31:], "the header is damaged"),
        (lambda data: data[:4099] + b"\1" + data[4100:], "the index is damaged"),
    ],
)
def test_a_torn_or_foreign_file_is_refused_and_built_anew(tmp_path, caplog, damage, said) -> None:
    filled(in_file(tmp_path)).close()
    (path,) = page_files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    store = filled(in_file(tmp_path))
    assert said in caplog.text and "is rebuilt" in caplog.text
    check(store)
    store.close()
    assert page_files(tmp_path) == [path]


def test_a_file_of_another_model_under_this_name_is_refused(tmp_path: Path, caplog) -> None:
    filled(in_file(tmp_path)).close()
    (mine,) = page_files(tmp_path)
    filled(in_file(tmp_path, codec="none")).close()
    (other,) = set(page_files(tmp_path)) - {mine}
    mine.write_bytes(other.read_bytes())
    store = filled(in_file(tmp_path))
    assert "the weights, layout, codec or options differ" in caplog.text
    check(store)
    store.close()


@pytest.mark.parametrize("codec", ["none", "fixed4"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_bit_that_flips_on_the_disk_is_noticed_at_the_read(
    tmp_path, codec, direct, caplog
) -> None:
    store = filled(in_file(tmp_path, codec, direct=direct))
    (path,) = page_files(tmp_path)
    with path.open("r+b") as file:
        file.seek(2 * 4096 + 1000)
        byte = file.read(1)
        file.seek(2 * 4096 + 1000)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(StoreError, match=r"part 0 of page 0 is damaged.*start again") as info:
        store.read_into(0, rows())
    assert info.value.code == "FM307" and "retrying once" in caplog.text
    store.read_into(1, rows())
    store.close()
    assert [file.suffix for file in page_files(tmp_path)] == [".damaged"]
    store = filled(in_file(tmp_path, codec, direct=direct))
    check(store)
    store.close()
    assert page_files(tmp_path) == [path]


def test_a_page_that_decodes_to_other_bytes_is_noticed(tmp_path: Path, monkeypatch) -> None:
    store = filled(in_file(tmp_path))
    decode = Coder.decode

    def wrong(self, kept, out) -> None:
        decode(self, kept, out)
        out[0] ^= 1

    monkeypatch.setattr(Coder, "decode", wrong)
    with pytest.raises(StoreError, match=r"part 0 of page 3 is not what was encoded"):
        store.read_into(3, rows())
    store.close()


HEADS = {
    "not JSON": b"{",
    "a list": b"[]",
    "nested too deeply": b"[" * 3000,
    "no sum": b'{"about": {}}',
    "a text as sum": b'{"about": {}, "index_crc": "4096"}',
    "a fraction": b'{"about": {}, "index_crc": 4096.5}',
    "an infinite sum": b'{"about": {}, "index_crc": 1e999}',
    "more than is known": b'{"about": {}, "index_crc": 0, "index": 4096}',
    "about is a number": b'{"about": 3, "index_crc": 0}',
    "null": b"null",
    "not UTF-8": b"\xff\xfe",
    "no text": b"",
}


@pytest.mark.parametrize("text", HEADS.values(), ids=HEADS.keys())
def test_e10_a_header_that_says_nonsense_is_refused_and_built_anew(tmp_path, caplog, text) -> None:
    filled(in_file(tmp_path)).close()
    (path,) = page_files(tmp_path)
    head = pagefile.PREFIX.pack(pagefile.MAGIC, pagefile.VERSION, len(text), zlib.crc32(text))
    path.write_bytes((head + text).ljust(4096, b"\0") + path.read_bytes()[4096:])
    store = filled(in_file(tmp_path))
    assert "the header is damaged" in caplog.text and "is rebuilt" in caplog.text
    check(store)
    store.close()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((3, 0, pagefile.OFFSET), 8192 + 512),  # not at a sector boundary
        ((0, 0, pagefile.OFFSET), 4096),  # in the index
        ((3, 0, pagefile.OFFSET), 2**63),
        ((3, 0, pagefile.OFFSET), 2**64 - 4096),
        ((3, 1, pagefile.OFFSET), 0),  # half a page
        ((3, 1, pagefile.OFFSET), 8192),  # does not follow the first part
        ((3, 0, pagefile.LENGTH), 0),
        ((3, 0, pagefile.LENGTH), 40_961),  # longer than the part
        ((3, 2, pagefile.LENGTH), 2**64 - 1),
    ],
)
def test_e10_an_index_that_says_nonsense_is_refused_and_built_anew(
    tmp_path, caplog, where, value
) -> None:
    filled(in_file(tmp_path)).close()
    (path,) = page_files(tmp_path)
    data = path.read_bytes()
    index = np.frombuffer(data[4096:][: PAGES * 3 * 32], np.uint64).reshape(PAGES, 3, 4).copy()
    index[where] = value
    head = json.loads(data[pagefile.PREFIX.size : 4096].rstrip(b"\0"))
    text = json.dumps({**head, "index_crc": zlib.crc32(index.tobytes())}).encode()
    prefix = pagefile.PREFIX.pack(pagefile.MAGIC, pagefile.VERSION, len(text), zlib.crc32(text))
    path.write_bytes(
        (prefix + text).ljust(4096, b"\0") + index.tobytes().ljust(4096, b"\0") + data[8192:]
    )
    store = filled(in_file(tmp_path))
    assert "the index is damaged" in caplog.text
    check(store)
    store.close()


@pytest.mark.parametrize("kind", ["a FIFO", "a link", "a folder", "of another user"])
def test_e10_what_is_no_file_of_ours_is_not_read(tmp_path, caplog, kind) -> None:
    filled(in_file(tmp_path)).close()
    (path,) = page_files(tmp_path)
    elsewhere = path.rename(tmp_path / "elsewhere")
    match kind:
        case "a FIFO":
            os.mkfifo(path)
        case "a link":
            path.symlink_to(elsewhere)
        case "a folder":
            path.mkdir()
            with pytest.raises(StoreError, match="cannot be written: Is a directory"):
                filled(in_file(tmp_path))
            return
        case "of another user":
            elsewhere.rename(path)
            if os.geteuid():
                pytest.skip("needs root")
            os.chown(path, 12345, 12345)
    store = filled(in_file(tmp_path))
    assert "is rebuilt" in caplog.text
    check(store)
    store.close()
    assert path.is_file() and not path.is_symlink()


def test_two_starts_on_one_folder_each_keep_the_file_that_they_wrote(tmp_path: Path) -> None:
    """The start that finishes last replaces the other start's file, which is identical."""
    stores = [in_file(tmp_path) for _ in range(2)]
    for parts in layers():
        for store in stores:
            store.adopt(parts)
    for store in stores:
        check(store)
        store.close()
    assert len(page_files(tmp_path)) == 1


def test_a_file_that_disappears_while_it_is_looked_for_is_built(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda *_, **__: True)
    store = filled(in_file(tmp_path))
    check(store)
    store.close()


def test_a_read_that_fails_once_is_made_again(tmp_path: Path, monkeypatch, caplog) -> None:
    store = filled(in_file(tmp_path))
    real, failures = os.preadv, [OSError(5, "Input/output error")]

    def preadv(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    check(store)
    assert "Input/output error" in caplog.text
    failures[:] = [OSError(5, "Input/output error")] * 2
    with pytest.raises(StoreError, match="cannot be read at 8192: Input/output error"):
        store.read_into(0, rows())
    store.close()


@pytest.mark.parametrize("size", [40_960, 3 << 20])
def test_what_the_system_has_not_in_memory_is_read_past_its_cache(
    tmp_path, monkeypatch, size
) -> None:
    geometry, page_class = Geometry(1, 2), PageClass((Part("w", size + 6, size // 2 + 3),))
    weights = np.random.default_rng(0).integers(0, 256, (2, size + 6), np.uint8)
    coder = Coder(plugins.load().create("codec", "none"), "none")
    tier = FileTier(geometry, page_class, tmp_path, coder, None, key=dict)
    store = TieredStore(geometry, page_class, [tier])
    store.adopt([weights])
    if tier._file._direct < 0:
        pytest.skip("this file system has no direct I/O")
    os.posix_fadvise(tier._file._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    before = read_bytes()
    for page in (1, 0):
        store.read_into(page, [row := np.zeros(size + 6, np.uint8)])
        assert (row == weights[page]).all()
    time.sleep(0.3)  # a read-ahead may still be under way
    stored = 2 * pagefile.sectors(size + 6)
    assert not residency.cached(tier._file._fd, 8192, stored)
    assert read_bytes() - before in (0, stored)  # 0 if the system does not count this disk
    store.close()


def read_bytes() -> int:
    """Return the bytes that this process has read from disks."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


@pytest.mark.parametrize("how", ["cachestat", "mincore", "neither"])
def test_residency_reads_nothing(tmp_path: Path, monkeypatch, how) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    if how != "cachestat":
        monkeypatch.setattr(residency, "_CACHESTAT", 9999)
    if how == "neither":
        monkeypatch.setattr(residency.mmap, "mmap", lambda *_, **__: os.read(-1, 1))
    assert residency.cached(fd, 0, 16 << 20) is (how != "neither")
    os.posix_fadvise(fd, 8 << 20, 8 << 20, os.POSIX_FADV_DONTNEED)
    for _ in range(2):
        assert not residency.cached(fd, 0, 16 << 20)
        assert not residency.cached(fd, 12 << 20, 100)
        assert residency.cached(fd, 4 << 20, 100) is (how != "neither")
    os.close(fd)


@pytest.mark.parametrize("at", ["mkstemp", "pwrite", "fsync", "replace"])
def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch, at) -> None:
    import tempfile

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = in_file(tmp_path)
    monkeypatch.setattr(tempfile if at == "mkstemp" else os, at, full)
    with pytest.raises(StoreError, match=r"No space left on device.*free some space") as info:
        filled(store)
    assert info.value.code == "FM307" and str(tmp_path) in info.value.where
    monkeypatch.undo()
    store.close()
    assert not page_files(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created: Not a directory"):
        filled(in_file(tmp_path / "file" / "below"))


def test_a_store_that_is_closed_while_it_is_filled_is_continued(tmp_path: Path) -> None:
    store = in_file(tmp_path)
    store.adopt(layers()[0])
    store.close()
    (part,) = page_files(tmp_path)
    store = in_file(tmp_path)
    assert store.claim(0) and not store.claim(GEOMETRY.experts_per_layer)
    assert page_files(tmp_path) == [part]
    store.close()


def test_pages_whose_data_did_not_reach_the_disk_are_put_again(tmp_path: Path) -> None:
    store = in_file(tmp_path)
    store.adopt(layers()[0])
    store.close()
    (part,) = page_files(tmp_path)
    with part.open("r+b") as file:  # as after a power failure
        file.seek(8192)
        file.write(bytes(100))
    store = in_file(tmp_path)
    experts = GEOMETRY.experts_per_layer
    assert [store.claim(page) for page in range(experts)] == [False, True, True, True]
    for page in (0, *range(experts, PAGES)):
        store.put(page, [part[page % experts] for part in layers()[page // experts]])
    store.finish()
    check(store)
    store.close()


def test_weights_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    keys = [{"weights": "new"}, {"weights": "old"}]
    coder = Coder(plugins.load().create("codec", "none"), "none")
    tier = FileTier(GEOMETRY, PAGE_CLASS, tmp_path, coder, None, key=lambda: keys.pop())
    store = TieredStore(GEOMETRY, PAGE_CLASS, [tier])
    with pytest.raises(StoreError, match=r"the weights changed while they were read.*start again"):
        filled(store)
    store.close()
    assert not page_files(tmp_path)


@pytest.mark.parametrize("more", [0, 5000])
def test_what_a_killed_process_leaves_behind_is_continued(tmp_path: Path, more: int) -> None:
    program = (
        "import os; from pathlib import Path; from tests.stores.test_tiers import *;"
        f"store = in_file(Path({str(tmp_path)!r})); store.adopt(layers()[0]); os._exit(9)"
    )
    for _ in range(2):  # the second finds the first's pages
        subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2])
        (orphan,) = page_files(tmp_path)
        assert orphan.suffix == ".part"
    with orphan.open("ab") as file:
        file.write(bytes(more))  # a page that the index does not list yet
    store = in_file(tmp_path)
    experts = GEOMETRY.experts_per_layer
    assert [store.claim(page) for page in range(PAGES)] == [page < experts for page in range(PAGES)]
    other = filled(in_file(tmp_path))  # ignores the file that another store is writing
    assert orphan in page_files(tmp_path) and len(page_files(tmp_path)) == 2
    for page in range(experts, PAGES):
        store.put(page, [part[page % experts] for part in layers()[page // experts]])
    store.finish()
    for each in (store, other):
        check(each)
        each.close()
    assert len(page_files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["header", "index", "end", "other weights"])
def test_an_unfinished_file_that_is_damaged_is_removed(tmp_path: Path, damage: str) -> None:
    program = (
        "import os; from pathlib import Path; from tests.stores.test_tiers import *;"
        f"store = in_file(Path({str(tmp_path)!r})); store.adopt(layers()[0]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2])
    (orphan,) = page_files(tmp_path)
    data = orphan.read_bytes()
    match damage:
        case "header":
            orphan.write_bytes(b"x" + data[1:])
        case "index":
            orphan.write_bytes(data[:4097] + b"\xff" + data[4098:])
        case "end":
            orphan.write_bytes(data[:9000])
        case "other weights":
            orphan.write_bytes(data[:20] + data[20:].replace(b"first", b"other"))
    store = in_file(tmp_path)
    assert not any(store.claim(page) for page in range(PAGES))
    assert orphan not in page_files(tmp_path)
    check(filled(store))
    store.close()


def test_page_files_have_limits_too_and_keep_them_when_found_again(tmp_path: Path, caplog) -> None:
    stores = [
        {"kind": "file", "path": str(tmp_path), "limit": 400_000, "codec": "fixed4"},
        {"kind": "host"},
    ]
    written = []
    for _ in range(2):
        store = filled(store_of(stores))
        check(store)
        assert 0 < len(store._tiers[0]._held) < PAGES and store._tiers[0].nbytes <= 400_000
        store.close()
        written += [path.stat().st_mtime_ns for path in page_files(tmp_path)]
    assert written[0] == written[1] and not caplog.records


def test_each_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    for limit in ("400KB", "500KB", "1GiB"):
        file = {"kind": "file", "path": str(tmp_path), "limit": limit}
        store = filled(store_of([file, {"kind": "host"}]))
        check(store)
        store.close()
    assert len(store._tiers[0]._held) == PAGES and len(page_files(tmp_path)) == 3


def test_a_page_file_without_room_for_a_page_is_not_made(tmp_path: Path) -> None:
    file = {"kind": "file", "path": str(tmp_path), "limit": 1000}
    store = filled(store_of([file, {"kind": "host"}]))
    check(store)
    store.close()
    assert not page_files(tmp_path)


def test_a_file_that_was_published_before_it_could_be_locked_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_file(tmp_path)
    first.adopt(layers()[0])
    lock, published = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not published:  # the first writer finishes between the second's search and its lock
            published.append(True)
            for parts in layers()[1:]:
                first.adopt(parts)
            first.finish()
        lock(fd, operation)

    monkeypatch.setattr(pagewriter.fcntl, "flock", late)
    second = in_file(tmp_path)
    second.claim(0)
    filled(second)
    for each in (first, second):
        check(each)
        each.close()
    assert published and len(page_files(tmp_path)) == 1
