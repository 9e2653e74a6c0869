"""The file of one stored segment: what it holds, its keys and values as raw bytes, and a checksum of every block.

    magic, 8 bytes | length of the header, uint64 | header, JSON | zeros up to DATA_OFFSET
    data: for each layer the keys of all tokens, then their values
    xxh3 of each block of the data, uint64 | xxh3 of all that is not data, uint64

Numbers are little-endian. Nothing in a file is trusted before it was compared with what is expected of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
from contextlib import suppress
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
MAX_BLOCKS = 1 << 20
NUMBER = np.dtype("<u8")
Header = dict[str, Any]


class SegmentError(Exception):
    """A file that cannot be used; the message says why."""


class NewerFormat(SegmentError):
    """A file that a later version of this package can use."""


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

    While it is written it is locked: one that nobody has locked was left behind by a process that died, see is_stale.
    Its whole size is taken at once, so that a full disk is known before anything is copied. OSError for whatever the
    disk refuses.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, {"format": FORMAT, **header}
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o600)
        self._position = DATA_OFFSET
        self._checksums: list[int] = []
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.rename(self._temporary, self._path)
        self._close()
        sync_directory(self._path.parent)

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
            self._file = ReadAheadFile(path, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise SegmentError("is a link" if path.is_symlink() else f"cannot be opened: {error.strerror}") from None
        try:
            self.header, self._sums = self._read_ends(expected or {})
            self._file.seek(DATA_OFFSET)
        except BaseException:
            self._file.close()
            raise

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
            got = self._file.readinto(rest)
            if not got:
                raise SegmentError("was cut off while it was read")
            rest = rest[got:]
        if checksum(block) != self._sums[number]:
            raise SegmentError(f"block {number} of {self.num_blocks} is damaged: its checksum differs")
        return block

    def _read_ends(self, expected: Header) -> tuple[Header, list[int]]:
        """The header and the blocks' checksums. Nothing is allocated for a size that the file does not have."""
        descriptor = self._file.fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SegmentError("is no file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise SegmentError(
                f"belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}: expected this user, "
                f"{os.geteuid()}, and 0600"
            )
        front = os.pread(descriptor, DATA_OFFSET, 0)
        header = _read_header(front)
        for key, value in expected.items():
            if header.get(key) != value:
                raise SegmentError(f"its {key} is {header.get(key)!r:.200}, not {value!r:.200}")
        size = file_bytes(header)
        if status.st_size != size:
            raise SegmentError(f"has {status.st_size:,} bytes, not the {size:,} of its header")
        tail = os.pread(descriptor, size - DATA_OFFSET - header["data_bytes"], DATA_OFFSET + header["data_bytes"])
        sums = tail[: -NUMBER.itemsize]
        if _seal(front, sums) != tail[-NUMBER.itemsize :]:
            raise SegmentError("its header or its checksums are damaged")
        return header, np.frombuffer(sums, NUMBER).tolist()


def is_stale(path: Path) -> bool:
    """Whether an unfinished file was left behind by a process that died."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _read_header(front: bytes) -> Header:
    length = int.from_bytes(front[8:16], "little")
    if len(front) < DATA_OFFSET or front[:8] != MAGIC or length > DATA_OFFSET - 16:
        raise SegmentError("is no file of a prefix store")
    try:
        header = json.loads(front[16 : 16 + length])
    except (ValueError, RecursionError):
        raise SegmentError("its header is damaged") from None
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise SegmentError("its header is damaged")
    if header["format"] != FORMAT:
        raise NewerFormat(f"is of format {header['format']}: this version of the package reads format {FORMAT}")
    sizes = [header.get(name) for name in ("data_bytes", "block_bytes")]
    if any(type(size) is not int or not 0 < size < 1 << 60 for size in sizes) or num_blocks(header) > MAX_BLOCKS:
        raise SegmentError("its header is damaged")
    return header
