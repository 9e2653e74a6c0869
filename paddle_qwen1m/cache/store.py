"""Prefixes kept in a folder: which file holds which segment, how much room all take, and which go first.

The folder alone says what is there: nothing is remembered between two calls, so that a restart loses nothing and
several processes can share it. Segments lie in subfolders by the tokens that they end with; see segment_name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paddle_qwen1m.cache.prefix import M2Range
from paddle_qwen1m.cache.segment_file import (
    DamagedSegment,
    Header,
    SegmentError,
    SegmentReader,
    SegmentWriter,
    file_bytes,
    remove_if_stale,
)
from paddle_qwen1m.fileio.durable import TEMPORARY_SUFFIX

NAME_BYTES = 16
"""Of the digests in a file's name."""
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{16})\.([0-9]{1,4})of([0-9]{1,4})\.kv")
SUBFOLDER = re.compile("[0-9a-f]{2}")
WORDS = {"ranks": "tensor parallel ranks", "placement": "placement of heads"}
"""What is said of fields of MadeUnder."""

logger = logging.getLogger(__name__)


def segment_name(tokens: str, chain: str, m2: M2Range) -> str:
    """The name of a segment: of all tokens up to its end; of these, how they were cut and all else that decides about
    their keys; of the m^2 that they depend on.
    """
    low, high = (np.float64(value).tobytes()[::-1].hex() for value in m2)
    return f"{tokens}-{chain}-{low}-{high}"


def m2_of(name: str) -> M2Range:
    """The m^2 that is in a name."""
    low, high = (float(np.frombuffer(bytes.fromhex(text)[::-1], "<f8")[0]) for text in name.split("-")[2:])
    return M2Range(low, high)


def token_digests(tokens: np.ndarray, borders: Iterable[int], salt: str) -> Iterator[str]:
    """Names of the first `border` tokens, int64 [n], for each of the ascending borders; other ones for another salt."""
    running = hashlib.blake2b(digest_size=NAME_BYTES, key=hashlib.blake2b(salt.encode(), digest_size=32).digest())
    data, begin = np.ascontiguousarray(tokens, "<i8").data.cast("B"), 0
    for border in borders:
        running.update(data[8 * begin : 8 * border])
        begin = border
        yield running.hexdigest()


def time_of_use(when: float, number: int) -> float:
    """What the `number`-th segment of a prefix that is used at `when`, in seconds since 1970, gets as its time: where
    there is no more room, the end of a prefix goes before its beginning.
    """
    return when - 1e-3 * number


class StoredFile(NamedTuple):
    """A file of the store: its path, bytes, and when it was used last, seconds since 1970."""

    path: Path
    nbytes: int
    used: float

    @property
    def segment(self) -> str:
        """What all ranks' files of a segment have in common."""
        return str(self.path.parent / self.path.name.partition(".")[0])

    @property
    def is_unfinished(self) -> bool:
        """Whether somebody is writing it."""
        return self.path.name.endswith(TEMPORARY_SUFFIX)


class PrefixStore:
    """The files of rank `rank` of `degree` in a folder that several ranks and processes may share.

    size: most bytes of all files in it. ValueError for a folder that cannot be used, or that others can enter.
    """

    def __init__(self, directory: str | os.PathLike[str], size: int | None = None, rank: int = 0, degree: int = 1):
        self.directory, self._size, self._rank, self._degree = Path(directory), size, rank, degree
        self._said: set[str] = set()
        prepare(self.directory)

    def path(self, name: str) -> Path:
        """Of this rank's file."""
        return self.directory / name[:2] / f"{name}.{self._rank}of{self._degree}.kv"

    def find(self, tokens: str, chain: str) -> list[str]:
        """Names of segments of these tokens, made in that way, of which this rank has a file, whatever their m^2."""
        ending, found = f".{self._rank}of{self._degree}.kv", []
        for name in self._names(tokens):
            if name.startswith(f"{tokens}-{chain}-") and name.endswith(ending) and FILE.fullmatch(name):
                found.append(name[: -len(ending)])
        return found

    def why_not(self, tokens: str, made_under: str) -> str | None:
        """What keeps segments of these tokens that are here from being used: how they were made differently."""
        wanted = json.loads(made_under)
        for name in self._names(tokens):
            with suppress(SegmentError, ValueError, KeyError, TypeError, RecursionError):
                with SegmentReader(self.directory / tokens[:2] / name) as reader:
                    there = json.loads(reader.header["made_under"])
                differing = _differences(there, wanted)
                return (
                    "; ".join(f"{key} {there}, here {here}" for key, there, here in differing)
                    or "other cuts, or another m^2"
                )
        return None

    def open(self, name: str, expected: Header) -> SegmentReader:
        """This rank's file of a segment. SegmentError for one that is not there, or that is not what is expected."""
        path = self.path(name)
        if path.parent.is_symlink():
            raise SegmentError("it is behind a link")
        return SegmentReader(path, {**expected, "name": name})

    def create(self, name: str, header: Header, used: float) -> SegmentWriter | None:
        """This rank's file of a segment, to be written and published, once there is room for it: what was used before
        it, at `used`, makes room. None where nothing can, or where it is there already. OSError for what the disk
        refuses.
        """
        path, header = self.path(name), {**header, "name": name}
        if path.exists() or path.parent.is_symlink():
            return None
        with _locked(self.directory):  # together, all who write stay within the limit
            if not self._make_room(file_bytes(header), used):
                return None
            path.parent.mkdir(mode=0o700, exist_ok=True)
            return SegmentWriter(path, header, partial(_locked, self.directory))

    def touch(self, names: Iterable[str], when: float | None = None) -> None:
        """This rank's files of a prefix, from its beginning on, were used now, or `when`."""
        used = time.time() if when is None else when
        for number, name in enumerate(names):
            with suppress(OSError):  # whoever may not write here reads all the same
                os.utime(self.path(name), (used, time_of_use(used, number)), follow_symlinks=False)

    def ignore(self, name: str, reason: SegmentError) -> None:
        """Says what was wrong with this rank's file of a segment; a damaged one goes, so that it is written again."""
        path = self.path(name)
        if not isinstance(reason, DamagedSegment):
            self.say(f"{path} is ignored: {reason}")
            return
        logger.warning(f"prefix store: {path} is removed: {reason}")
        with suppress(OSError):
            path.unlink()

    def say(self, text: str) -> None:
        """A line in the log, once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(f"prefix store: {text}")

    def _names(self, tokens: str) -> list[str]:
        folder = self.directory / tokens[:2]
        try:
            return [] if folder.is_symlink() else [name for name in os.listdir(folder) if name.startswith(tokens)]
        except OSError:
            return []

    def _make_room(self, nbytes: int, used: float) -> bool:
        """Whether so many bytes more are within the limit, once segments that were used before `used` have gone. None
        goes where that is not enough.
        """
        if self._size is None:
            return True
        if nbytes * self._degree > self._size:
            self.say(
                f"a segment of {nbytes * self._degree:,} bytes is more than prefix_store_size, {self._size:,}: it is "
                "not kept"
            )
            return False
        files = stored_files(self.directory)
        excess = sum(file.nbytes for file in files) + nbytes - self._size
        expendable = _least_used(files, excess, used)
        if sum(file.nbytes for file in expendable) < excess:
            self.say(
                f"prefix_store_size, {self._size:,} bytes, is less than what is in use: ends of prefixes are not kept"
            )
            return False
        return sum(file.nbytes for file in _remove(expendable)) >= excess


def prepare(directory: Path) -> None:
    """Makes the folder of a store, for this user alone, where there is none, and removes what processes that died left
    behind. ValueError for one that cannot be used, or that others can enter: keys and values reveal the text that they
    were made of, and whoever can write there can change answers.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        is_empty = not any(directory.iterdir())
        if is_empty and status.st_uid == os.geteuid() and status.st_mode & 0o077:
            directory.chmod(0o700)
            status = directory.stat()
    except FileExistsError:
        raise ValueError(f"prefix_store: {directory} is no folder") from None
    except OSError as error:
        raise ValueError(f"prefix_store: {directory} cannot be used: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ValueError(
            f"prefix_store: {directory} belongs to user {status.st_uid} and has mode "
            f"{stat.S_IMODE(status.st_mode):04o}: keys and values reveal the text that they were made of, and who can "
            f"write there can change answers. Take another folder, or make it yours alone: chmod 700 {directory}"
        )
    _, foreign = _scan(directory)
    if foreign:
        logger.warning(
            f"prefix store: {len(foreign)} files or folders in {directory} are not of a store and are ignored"
        )


def stored_files(directory: Path) -> list[StoredFile]:
    """All files of a store, unfinished ones among them, the least recently used first."""
    return sorted(_scan(directory)[0], key=lambda file: file.used)


@dataclass
class StoredDocument:
    """Prompts that begin alike and were read in one way. tokens: of the longest. ranks: that share the model. used:
    last, in seconds since 1970.
    """

    name: str
    made_under: dict[str, Any]
    ranks: int
    tokens: int = 0
    files: int = 0
    nbytes: int = 0
    used: float = 0.0


def documents(directory: Path) -> tuple[list[StoredDocument], list[tuple[Path, str]]]:
    """What is in a store, the least recently used first; and files whose headers are no good, with the reason."""
    found: dict[tuple[str, str, int], StoredDocument] = {}
    bad: list[tuple[Path, str]] = []
    for file in stored_files(directory):
        if file.is_unfinished:
            continue
        try:
            with SegmentReader(file.path) as reader:
                header = reader.header
            key = (str(header["document"]), str(header["made_under"]), int(file.path.stem.rpartition("of")[2]))
            one = found.setdefault(key, StoredDocument(key[0], json.loads(key[1]), key[2]))
            one.tokens = max(one.tokens, int(header["end"]))
        except (SegmentError, KeyError, ValueError, TypeError) as error:
            bad.append((file.path, str(error) if isinstance(error, SegmentError) else "its header is damaged"))
            continue
        one.files, one.nbytes, one.used = one.files + 1, one.nbytes + file.nbytes, max(one.used, file.used)
    return sorted(found.values(), key=lambda one: one.used), bad


def verify(directory: Path) -> Iterator[tuple[StoredFile, str | None]]:
    """Every file, read from its beginning to its end, and what is wrong with it."""
    for file in stored_files(directory):
        if file.is_unfinished:
            continue
        reason = None
        try:
            with SegmentReader(file.path) as reader:
                buffer = np.empty(min(reader.header["block_bytes"], reader.header["data_bytes"]), np.uint8)
                for number in range(reader.num_blocks):
                    reader.read(number, buffer)
        except SegmentError as error:
            reason = str(error)
        yield file, reason


def prune(directory: Path, size: int) -> tuple[int, int]:
    """Removes the segments that were used least recently until all files together have at most `size` bytes: how many
    files went, and their bytes. What is being written stays.
    """
    with _locked(directory):
        files = stored_files(directory)
        removed = _remove(_least_used(files, sum(file.nbytes for file in files) - size))
    return len(removed), sum(file.nbytes for file in removed)


def _least_used(files: Iterable[StoredFile], nbytes: int, before: float = math.inf) -> list[StoredFile]:
    """Files of the segments that were used least recently, all of them before `before`, which together have `nbytes`
    or more; of all there are where those do not. None that is being written.
    """
    of_segment: dict[str, list[StoredFile]] = {}
    for file in files:
        if not file.is_unfinished:
            of_segment.setdefault(file.segment, []).append(file)
    chosen: list[StoredFile] = []
    for used, together in sorted((max(file.used for file in together), together) for together in of_segment.values()):
        if nbytes <= 0 or used >= before:
            break
        chosen += together
        nbytes -= sum(file.nbytes for file in together)
    return chosen


def _remove(files: Iterable[StoredFile]) -> list[StoredFile]:
    """Those that are gone now."""
    removed = []
    for file in files:
        with suppress(OSError):
            file.path.unlink(missing_ok=True)
            removed.append(file)
    return removed


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One thread of one process at a time counts or names files of a store."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a process that was forked meanwhile has it open, too
        os.close(descriptor)


def _scan(directory: Path) -> tuple[list[StoredFile], list[Path]]:
    """The files of a store, and what lies there and is none. Unfinished files that nobody writes any more go."""
    files, foreign = [], []
    for folder in _entries(directory):
        if not SUBFOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
            foreign.append(Path(folder.path))
            continue
        for entry in _entries(Path(folder.path)):
            path, name = Path(entry.path), entry.name
            unfinished = name.endswith(TEMPORARY_SUFFIX)
            if unfinished:
                name = name[: -len(TEMPORARY_SUFFIX)].rpartition(".")[0]
            if not FILE.fullmatch(name) or not entry.is_file(follow_symlinks=False):
                foreign.append(path)
            elif not (unfinished and remove_if_stale(path)):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    files.append(StoredFile(path, status.st_size, status.st_mtime))
    return files, foreign


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two values of JSON differ, in words that a line of a log can take."""
    if isinstance(there, dict) and isinstance(here, dict):
        told = {*there, *here}
        if there.get("ranks") != here.get("ranks"):
            told.discard("placement")  # other ranks cannot have the same
        return [
            found for name in sorted(told) for found in _differences(there.get(name), here.get(name), f"{key}{name}")
        ]
    if there == here:
        return []
    if key == "sparse":
        return [("prefill", "dense" if there is None else "sparse", "dense" if here is None else "sparse")]
    return [(WORDS.get(key, key), _short(there), _short(here))]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
