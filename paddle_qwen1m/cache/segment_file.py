"""The file of one stored segment: what it holds, its keys and values as raw bytes, and a checksum of every block.

    magic, 8 bytes | length of the header, uint64 | header, JSON | zeros up to DATA_OFFSET
    data: for each layer the keys of all tokens, then their values; 8 bits: layers that stay in 16 bits first, and
        behind all of these the scales, likewise
    xxh3 of each block of the data, uint64 | xxh3 of all that is not data, uint64

Numbers are little-endian. Nothing in a file is trusted before it was compared with what is expected of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from paddle_qwen1m.fileio.durable import TEMPORARY_SUFFIX, sync_directory
from paddle_qwen1m.fileio.readahead import ReadAheadFile

FORMAT = 1
MAGIC = b"qwen1mkv"
DATA_OFFSET = 1 << 16
MAX_BLOCKS, MAX_BLOCK_BYTES = 1 << 20, 1 << 30
NUMBER = np.dtype("<u8")
Header = dict[str, Any]
"""Texts, whole numbers, and lists of these."""


class SegmentError(Exception):
    """A file that cannot be used; the message says why. What it holds may be of use to others."""


class DamagedSegment(SegmentError):
    """A file that is of no use to anybody: it does not hold what it says, or not what its name does."""


def checksum(data: Any) -> int:
    """xxh3 (64 bits) of a block; other threads of Python run meanwhile."""
    return int(xxhash.xxh3_64_intdigest(data))


def file_bytes(header: Header) -> int:
    """Size of the file that a header with `data_bytes` and `block_bytes` belongs to."""
    return int(DATA_OFFSET + header["data_bytes"] + NUMBER.itemsize * (num_blocks(header) + 1))


def num_blocks(header: Header) -> int:
    return -(-int(header["data_bytes"]) // int(header["block_bytes"]))


class SegmentWriter:
    """Writes a file under another name, which it gets rid of if anything goes wrong, and publishes it when whole.

    While it is written it is locked: one that nobody has locked was left behind by a process that died, see
    remove_if_stale. Its whole size is taken at once, so that a full disk is known before anything is copied. `naming`
    is held while it gets its name: who lists a folder meanwhile could find it under neither. OSError for whatever the
    disk refuses.
    """

    def __init__(
        self, path: Path, header: Header, naming: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._path, self._header, self._naming = path, {"format": FORMAT, **header}, naming
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        self._position = DATA_OFFSET
        self._checksums: list[int] = []
        self._descriptor = -1
        try:
            self._create()
            while not os.fstat(self._descriptor).st_nlink:  # somebody found it before it was locked, and removed it
                self._close()
                self._create()
            os.posix_fallocate(self._descriptor, 0, file_bytes(self._header))
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, block: np.ndarray) -> None:
        """The next block, uint8 [block_bytes]; the last one may be shorter."""
        self._checksums.append(checksum(block))
        self._write(block, self._position)
        self._position += block.nbytes

    def publish(self) -> None:
        """All blocks are written: the file gets its name, durably."""
        assert self._position == DATA_OFFSET + self._header["data_bytes"], "blocks are missing"
        front, sums = _front(self._header), np.asarray(self._checksums, NUMBER).tobytes()
        self._write(np.frombuffer(front, np.uint8), 0)
        self._write(np.frombuffer(sums + _seal(front, sums), np.uint8), self._position)
        os.fdatasync(self._descriptor)
        with self._naming():
            os.rename(self._temporary, self._path)
        self._close()
        sync_directory(self._path.parent)

    def _create(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def _write(self, data: np.ndarray, offset: int) -> None:
        rest = data.data.cast("B")
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def _discard(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                os.unlink(self._temporary)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


class SegmentReader:
    """A file whose header is what `expected` says, key by key, and whose data are checked block by block.

    SegmentError for one that is anything else: damaged, cut off, a link, another user's, open to others.
    """

    def __init__(self, path: Path, expected: Header | None = None) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            what = "is a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
            raise SegmentError(f"it {what}") from None
        try:
            self.header, self._sums = _read_ends(descriptor, expected or {})
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise SegmentError(f"it cannot be read: {error.strerror}") from None
            raise
        self._file = ReadAheadFile(path, descriptor)
        self._file.seek(DATA_OFFSET)

    def __enter__(self) -> SegmentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.header)

    def read(self, number: int, buffer: np.ndarray) -> np.ndarray:
        """Block `number`, the one behind that which was read before, into the front of `buffer` uint8, checked; while
        it is, the kernel fetches those that follow.
        """
        begin = number * self.header["block_bytes"]
        block = buffer[: min(self.header["block_bytes"], self.header["data_bytes"] - begin)]
        rest = block.data
        while rest:
            try:
                got = self._file.readinto(rest)
            except OSError as error:
                raise SegmentError(f"it cannot be read: {error.strerror}") from None
            if not got:
                raise DamagedSegment("it was cut off while it was read")
            rest = rest[got:]
        if checksum(block) != self._sums[number]:
            raise DamagedSegment(f"block {number} of {self.num_blocks} is damaged: its checksum differs")
        return block


def remove_if_stale(path: Path) -> bool:
    """Removes an unfinished file that was left behind by a process that died: whether it was."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # while it is locked: whoever has just made it, see SegmentWriter, finds it gone
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _front(header: Header) -> bytes:
    """What is before the data."""
    text = json.dumps(header, sort_keys=True).encode()
    front = MAGIC + len(text).to_bytes(8, "little") + text
    assert len(front) <= DATA_OFFSET, "a header that large would be no header"
    return front.ljust(DATA_OFFSET, b"\0")


def _seal(front: bytes, sums: bytes) -> bytes:
    return checksum(front + sums).to_bytes(NUMBER.itemsize, "little")


def _read_ends(descriptor: int, expected: Header) -> tuple[Header, list[int]]:
    """The header and the blocks' checksums. Nothing is allocated for a size that the file does not have."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SegmentError("it is no file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SegmentError(
            f"it belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}: expected this user, "
            f"{os.geteuid()}, and 0600"
        )
    front = os.pread(descriptor, DATA_OFFSET, 0)
    header = _read_header(front)
    for key, value in expected.items():
        if header.get(key) != value:
            raise DamagedSegment(f"its {key} is {header.get(key)!r:.200}, not {value!r:.200}")
    size = file_bytes(header)
    if status.st_size != size:
        raise DamagedSegment(f"it has {status.st_size:,} bytes, not the {size:,} of its header")
    tail = os.pread(descriptor, size - DATA_OFFSET - header["data_bytes"], DATA_OFFSET + header["data_bytes"])
    sums = tail[: -NUMBER.itemsize]
    if _seal(front, sums) != tail[-NUMBER.itemsize :]:
        raise DamagedSegment("its header or its checksums are damaged")
    return header, np.frombuffer(sums, NUMBER).tolist()


def _read_header(front: bytes) -> Header:
    length = int.from_bytes(front[8:16], "little")
    if len(front) < DATA_OFFSET or front[:8] != MAGIC or length > DATA_OFFSET - 16:
        raise DamagedSegment("it is no file of a prefix store")
    try:
        header = json.loads(front[16 : 16 + length])
    except (ValueError, RecursionError):
        raise DamagedSegment("its header is damaged") from None
    if not isinstance(header, dict) or type(header.get("format")) is not int or header["format"] < FORMAT:
        raise DamagedSegment("its header is damaged")
    if header["format"] > FORMAT:
        raise SegmentError(f"it is of format {header['format']}: this version of the package reads format {FORMAT}")
    if not all(_is_plain(value) for value in header.values()):
        raise DamagedSegment("its header is damaged")
    sizes = [header.get(name) for name in ("data_bytes", "block_bytes")]
    if (
        any(type(size) is not int or not 0 < size < 1 << 60 for size in sizes)
        or header["block_bytes"] > MAX_BLOCK_BYTES
        or num_blocks(header) > MAX_BLOCKS
    ):
        raise DamagedSegment("its header is damaged")
    return header


def _is_plain(value: Any) -> bool:
    """Whether a header may hold it; see Header."""
    of_a_list = value if isinstance(value, list) else [value]
    return all(isinstance(one, (str, int)) for one in of_a_list)
