"""Prefixes kept in a folder: which file holds which segment, how much room all take, and which go first.

The folder alone says what is there: nothing is remembered between two calls, so that a restart loses nothing and
several processes can share it. Segments lie in subfolders by the tokens that they end with; see segment_name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paddle_qwen1m.cache.prefix import M2Range
from paddle_qwen1m.cache.segment_file import (
    Header,
    NewerFormat,
    SegmentError,
    SegmentReader,
    SegmentWriter,
    file_bytes,
    is_stale,
)
from paddle_qwen1m.fileio.durable import TEMPORARY_SUFFIX

NAME_BYTES = 16
"""Of the digests in a file's name."""
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{16})\.([0-9]{1,4})of([0-9]{1,4})\.kv")
SUBFOLDER = re.compile("[0-9a-f]{2}")

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


class StoredFile(NamedTuple):
    """A file of the store: its path, bytes, and when it was used last, seconds since 1970."""

    path: Path
    nbytes: int
    used: float

    @property
    def segment(self) -> str:
        """What all ranks' files of a segment have in common."""
        return str(self.path.parent / self.path.name.partition(".")[0])


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
            with suppress(SegmentError, ValueError, KeyError):
                with SegmentReader(self.directory / tokens[:2] / name) as reader:
                    there = json.loads(reader.header["made_under"])
                differing = _differences(there, wanted)
                return "; ".join(f"{key} {there}, here {here}" for key, there, here in differing) or "another m^2"
        return None

    def open(self, name: str, expected: Header) -> SegmentReader:
        """This rank's file of a segment. SegmentError for one that is not there, or that is not what is expected."""
        return SegmentReader(self.path(name), {**expected, "name": name})

    def create(self, name: str, header: Header) -> SegmentWriter | None:
        """This rank's file of a segment, to be written and published, once there is room for it; None where there
        cannot be, or it is there already. OSError for what the disk refuses.
        """
        path, header = self.path(name), {**header, "name": name}
        nbytes = file_bytes(header)
        if path.exists() or not self.make_room(nbytes):
            return None
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return SegmentWriter(path, header)

    def touch(self, names: Iterable[str], when: float | None = None) -> None:
        """This rank's files of a prefix, from its beginning on, were used now, or `when`: where there is no more room,
        its end goes before its beginning.
        """
        used = time.time() if when is None else when
        for number, name in enumerate(names):
            with suppress(OSError):  # whoever may not write here reads all the same
                os.utime(self.path(name), (used, used - 1e-3 * number))

    def make_room(self, nbytes: int) -> bool:
        """Removes the files that were used least recently until so many bytes more are within the limit; those of one
        segment together. False, and nothing is removed, where they never can be.
        """
        if self._size is None:
            return True
        if nbytes > self._size:
            self.say(f"a segment of {nbytes:,} bytes is more than prefix_store_size, {self._size:,}: nothing is stored")
            return False
        prune(self.directory, self._size - nbytes)
        return True

    def ignore(self, name: str, reason: Exception) -> None:
        """Says what was wrong with this rank's file of a segment; a damaged one goes, so that it is written again."""
        path = self.path(name)
        if not isinstance(reason, SegmentError):
            logger.warning(f"prefix store: {path} is ignored: {reason}")
            return
        logger.warning(f"prefix store: {path} is ignored: it {reason}")
        if not isinstance(reason, NewerFormat):
            with suppress(OSError):
                path.unlink()

    def say(self, text: str) -> None:
        """A line in the log, once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(f"prefix store: {text}")

    def _names(self, tokens: str) -> list[str]:
        try:
            return [name for name in os.listdir(self.directory / tokens[:2]) if name.startswith(tokens)]
        except OSError:
            return []


def prepare(directory: Path) -> None:
    """Makes the folder of a store, for this user alone, where there is none, and removes what processes that died left
    behind. ValueError for one that cannot be used, or that others can enter: keys and values reveal the text that they
    were made of, and whoever can write there can change answers.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
        if status.st_uid == os.geteuid() and status.st_mode & 0o077 and not any(directory.iterdir()):
            directory.chmod(0o700)
            status = directory.stat()
        list(directory.iterdir())
    except OSError as error:
        raise ValueError(f"prefix_store: {directory} cannot be used: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ValueError(
            f"prefix_store: {directory} belongs to user {status.st_uid} and has mode "
            f"{stat.S_IMODE(status.st_mode):04o}: keys and values reveal the text that they were made of, and who can "
            f"write there can change answers. Take another folder, or make it yours alone: chmod 700 {directory}"
        )
    foreign = sum(1 for _ in _walk(directory, foreign=True))
    if foreign:
        logger.warning(f"prefix store: {foreign} files or folders in {directory} are not of a store and are ignored")


def stored_files(directory: Path) -> list[StoredFile]:
    """All files of a store, unfinished ones among them, the least recently used first."""
    return sorted(_walk(directory), key=lambda file: file.used)


def prune(directory: Path, size: int) -> tuple[int, int]:
    """Removes the segments that were used least recently until all files together have at most `size` bytes: how many
    files went, and their bytes. What is being written stays.
    """
    files = stored_files(directory)
    total, removed, nbytes = sum(file.nbytes for file in files), 0, 0
    of_segment: dict[str, list[StoredFile]] = {}
    for file in files:
        of_segment.setdefault(file.segment, []).append(file)
    for together in of_segment.values():
        if total - nbytes <= size:
            break
        for file in together:
            if file.path.name.endswith(TEMPORARY_SUFFIX):
                continue
            with suppress(OSError):
                file.path.unlink()
                removed, nbytes = removed + 1, nbytes + file.nbytes
    return removed, nbytes


def _walk(directory: Path, *, foreign: bool = False) -> Iterator[Any]:
    """The StoredFiles, or the paths of what is not the store's. Unfinished files that nobody writes any more go."""
    for folder in _entries(directory):
        if not SUBFOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
            if foreign:
                yield Path(folder.path)
            continue
        for entry in _entries(Path(folder.path)):
            path = Path(entry.path)
            unfinished = entry.name.endswith(TEMPORARY_SUFFIX)
            name = entry.name[: -len(TEMPORARY_SUFFIX)].rpartition(".")[0] if unfinished else entry.name
            if not FILE.fullmatch(name) or not entry.is_file(follow_symlinks=False):
                if foreign:
                    yield path
                continue
            with suppress(OSError):
                if unfinished and is_stale(path):
                    path.unlink()
                elif not foreign:
                    status = entry.stat(follow_symlinks=False)
                    yield StoredFile(path, status.st_size, status.st_mtime)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two values of JSON differ, in words that a line of a log can take."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            found
            for name in sorted({*there, *here})
            for found in _differences(there.get(name), here.get(name), f"{key}{name}")
        ]
    if there == here:
        return []
    if key == "sparse":
        return [("prefill", *("dense" if value is None else "sparse" for value in (there, here)))]
    if key == "heads" and isinstance(there, list) and isinstance(here, list) and len(there) != len(here):
        return [("tensor parallel ranks", len(there), len(here))]
    return [(key, _short(there), _short(here))]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
