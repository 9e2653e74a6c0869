"""The file of a segment: what is written is read, whatever is damaged is found, what is foreign is refused."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from paddle_qwen1m.cache.segment_file import (
    DATA_OFFSET,
    DamagedSegment,
    SegmentError,
    SegmentReader,
    SegmentWriter,
    remove_if_stale,
)

DATA, BLOCK = 2500, 1000
HEADER = {"name": "n", "shape": [2, 2, 4], "data_bytes": DATA, "block_bytes": BLOCK}
FRONT = [0, 8, 15, 16, 20, 40, 90, 5000, DATA_OFFSET - 1]
SUMS = DATA_OFFSET + DATA
SEAL = SUMS + 8 * 3


@pytest.fixture
def data(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, DATA, np.uint8)


@pytest.fixture
def path(tmp_path: Path, data: np.ndarray) -> Path:
    """A whole file."""
    path = tmp_path / "segment.kv"
    with SegmentWriter(path, HEADER) as writer:
        for begin in range(0, DATA, BLOCK):
            writer.write(data[begin : begin + BLOCK])
        writer.publish()
    return path


def read(path: Path, expected: dict[str, Any] | None = None) -> bytes:
    with SegmentReader(path, expected) as reader:
        buffer = np.empty(reader.header["block_bytes"], np.uint8)
        return b"".join(reader.read(number, buffer).tobytes() for number in range(reader.num_blocks))


def forged(path: Path, header: Any, magic: bytes = b"qwen1mkv", length: int | None = None, size: int = 0) -> Path:
    """A file with a header of one's own, a dict or its text, and `size` bytes behind it which take no room."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    front = magic + struct.pack("<Q", len(text) if length is None else length) + text
    path.write_bytes(front.ljust(DATA_OFFSET, b"\0"))
    path.chmod(0o600)
    os.truncate(path, DATA_OFFSET + size)
    return path


def test_what_is_written_is_read(path: Path, data: np.ndarray) -> None:
    assert read(path) == read(path, HEADER) == data.tobytes()
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_file_is_as_documented(path: Path, data: np.ndarray) -> None:
    content = path.read_bytes()
    magic, length = struct.unpack_from("<8sQ", content)
    assert magic == b"qwen1mkv"
    assert json.loads(content[16 : 16 + length]) == {"format": 1, **HEADER}
    front, rest = content[:65536], content[65536:]
    assert not any(front[16 + length :])
    assert rest[:DATA] == data.tobytes()
    *sums, seal = struct.unpack("<4Q", rest[DATA:])
    assert sums == [xxhash.xxh3_64_intdigest(data[begin : begin + BLOCK].tobytes()) for begin in (0, 1000, 2000)]
    assert seal == xxhash.xxh3_64_intdigest(front + rest[DATA:-8])


@pytest.mark.parametrize(
    "place",
    [*FRONT, DATA_OFFSET, DATA_OFFSET + BLOCK, SUMS - 1, SUMS, SUMS + 8, SEAL - 1, SEAL, SEAL + 7],
)
def test_one_bit_is_found(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    for bit in (0, 7):
        content[place] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(SegmentError):
            read(path)
        content[place] ^= 1 << bit
    path.write_bytes(content)
    read(path)


@pytest.mark.parametrize(
    "size", [0, 8, 16, 100, DATA_OFFSET - 1, DATA_OFFSET, DATA_OFFSET + 1500, SUMS, SEAL, SEAL + 7]
)
def test_a_file_that_was_cut_off_is_damaged(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(DamagedSegment):
        read(path)


def test_a_file_with_something_behind_it_is_damaged(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedSegment, match="bytes, not the"):
        read(path)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(path: Path) -> None:
    with SegmentReader(path) as reader:
        buffer = np.empty(BLOCK, np.uint8)
        reader.read(0, buffer)
        os.truncate(path, DATA_OFFSET + BLOCK + 10)
        with pytest.raises(DamagedSegment, match="cut off"):
            reader.read(1, buffer)


WHOLE = {"format": 1, **HEADER}
FORGERIES: dict[str, dict[str, Any]] = {
    "magic": {"header": WHOLE, "magic": b"qwen1mkw"},
    "length huge": {"header": WHOLE, "length": 1 << 63},
    "length beyond the data": {"header": WHOLE, "length": DATA_OFFSET - 15},
    "no JSON": {"header": b"{"},
    "no text": {"header": b"\xff\xfe\xfd"},
    "deep": {"header": b"[" * 60_000},
    "deep inside": {"header": b'{"format": 1, "shape": ' + b"[" * 900 + b"]" * 900 + b"}"},
    "no object": {"header": [1]},
    "no format": {"header": HEADER},
    "format zero": {"header": {**WHOLE, "format": 0}},
    "format true": {"header": {**WHOLE, "format": True}},
    "NaN": {"header": b'{"format": 1, "data_bytes": NaN, "block_bytes": 1}'},
    "fraction": {"header": {**WHOLE, "data_bytes": 2500.0}},
    "text": {"header": {**WHOLE, "block_bytes": "1000"}},
    "true": {"header": {**WHOLE, "block_bytes": True}},
    "null": {"header": {**WHOLE, "block_bytes": None}},
    "no sizes": {"header": {"format": 1}},
    "nothing": {"header": {**WHOLE, "data_bytes": 0}},
    "negative": {"header": {**WHOLE, "block_bytes": -1}},
    "more than a number holds": {"header": {**WHOLE, "data_bytes": 1 << 70}},
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_header_that_is_none_is_damaged(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DamagedSegment, match=r"its header is damaged|no file of a prefix store"):
        read(forged(tmp_path / "f", **FORGERIES[kind], size=DATA + 32))


@pytest.mark.parametrize(
    ("data_bytes", "block_bytes"),
    [(1 << 40, 1 << 22), (1 << 40, 1 << 20), (1 << 40, 1 << 40), (1 << 20, 1), (1 << 40, 1), (100, 1 << 59)],
)
def test_sizes_of_a_forged_header_take_no_memory(tmp_path: Path, data_bytes: int, block_bytes: int) -> None:
    """The file has the size that its header says, and takes no room on the disk."""
    header = {**WHOLE, "data_bytes": data_bytes, "block_bytes": block_bytes}
    path = forged(tmp_path / "f", header, size=data_bytes + 8 * (-(-data_bytes // block_bytes) + 1))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSegment):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["name", "shape", "data_bytes", "missing"])
def test_what_is_not_expected_is_named(path: Path, key: str) -> None:
    with pytest.raises(DamagedSegment, match=f"its {key} is .*, not 'other'"):
        read(path, {**HEADER, key: "other"})


def test_a_later_format_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match="is of format 2: this version of the package reads format 1") as raised:
        read(forged(tmp_path / "f", {"format": 2, "data": {"in": {"another": "form"}}}))
    assert not isinstance(raised.value, DamagedSegment)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "mode", "user", "missing", "behind a file"])
def test_what_is_no_file_of_ones_own_is_refused_and_not_called_damaged(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, told = path.with_name("other"), f"is {'a link' if kind == 'link' else 'no file'}"
    if kind == "link":
        other.symlink_to(path)
    elif kind == "directory":
        other.mkdir(0o700)
    elif kind == "fifo":
        os.mkfifo(other, 0o600)
    elif kind == "missing":
        told = "cannot be opened: No such file"
    elif kind == "behind a file":
        other, told = path / "other", "cannot be opened: Not a directory"
    else:
        other, told = path, "mode 0644: expected" if kind == "mode" else f"user {os.geteuid()} with mode 0600: expected"
        path.chmod(0o644 if kind == "mode" else 0o600)
    if kind == "user":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SegmentError, match=told) as raised:
        SegmentReader(other)
    assert not isinstance(raised.value, DamagedSegment)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_the_disk_does_not_give_is_not_called_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(SegmentError, match="cannot be read: Input/output error") as raised:
            SegmentReader(path)
        assert not isinstance(raised.value, DamagedSegment)
    with SegmentReader(path) as reader:
        monkeypatch.setattr(reader._file, "readinto", fail)
        with pytest.raises(SegmentError, match="cannot be read: Input/output error"):
            reader.read(0, np.empty(BLOCK, np.uint8))


def test_a_file_that_is_not_published_is_gone(tmp_path: Path, data: np.ndarray) -> None:
    with SegmentWriter(tmp_path / "f", HEADER) as writer:
        writer.write(data[:BLOCK])
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.name != "f" and unfinished.stat().st_size == SEAL + 8, "its room is taken"
        assert unfinished.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_lacks_blocks_is_not_published(tmp_path: Path, data: np.ndarray) -> None:
    with pytest.raises(AssertionError, match="blocks are missing"), SegmentWriter(tmp_path / "f", HEADER) as writer:
        writer.write(data[:BLOCK])
        writer.publish()
    assert list(tmp_path.iterdir()) == []


def test_only_what_nobody_writes_is_stale(tmp_path: Path) -> None:
    with SegmentWriter(tmp_path / "f", HEADER):
        (unfinished,) = tmp_path.iterdir()
        assert not remove_if_stale(unfinished) and unfinished.exists()
    left = tmp_path / "left"
    left.write_bytes(b"")
    assert remove_if_stale(left) and not left.exists()
    assert not remove_if_stale(left)


def test_a_writer_whose_new_file_was_taken_for_a_stale_one_makes_another(
    tmp_path: Path, data: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a file and its lock there is a moment."""
    lock, found = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not found:
            found.extend(tmp_path.iterdir())
            assert remove_if_stale(found[0])
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with SegmentWriter(tmp_path / "f", HEADER) as writer:
        for begin in range(0, DATA, BLOCK):
            writer.write(data[begin : begin + BLOCK])
        writer.publish()
    assert read(tmp_path / "f") == data.tobytes() and len(found) == 1
