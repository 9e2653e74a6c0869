"""Segments on their way between the pages of a rank's cache and files, in the background."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from paddle_qwen1m.cache.layer_cache import PagedCache
from paddle_qwen1m.cache.segment_file import Header, SegmentError
from paddle_qwen1m.cache.store import PrefixStore, time_of_use
from paddle_qwen1m.fileio.staging import Staging

BLOCK_BYTES = 1 << 20
"""Of a file, read or written and checked at once: few enough that a core's cache holds them between these."""
UNFINISHED = -1
Run = tuple[np.ndarray, int, int]
"""Addresses int64 of pieces that follow each other in a block, 0 for those that are not wanted; the bytes of each, and
where in the block the first begins."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSegment:
    """Tokens [begin, end) of a prompt, under their name in the store."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class SegmentPages:
    """Segments, one behind the other, and the pages of their tokens from `first` on: those before it are not wanted.

    document: the name of the first segment's tokens. made_under: MadeUnder.name of the prompt. queued: when, in seconds
    since 1970.
    """

    segments: tuple[StoredSegment, ...]
    pages: tuple[int, ...]
    first: int
    document: str
    made_under: str
    queued: float


@dataclass(eq=False)
class _Transfer:
    """One that waits its turn, is under way, or is over. done: segments that are whole. nbytes: that went to or came
    from files.
    """

    what: SegmentPages
    writes: bool
    ready: Callable[[], Any]
    done: int = 0
    nbytes: int = 0
    is_over: bool = False
    given_up: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a block is copied from or to the pages."""


class Transfers:
    """What a rank reads and writes: one transfer of either kind at a time, each in a thread that ends when nothing is
    left, and that the interpreter waits for at its end.

    gpu: whether the pages are a GPU's.
    """

    def __init__(self, store: PrefixStore, cache: PagedCache, *, gpu: bool) -> None:
        self._store, self._cache = store, cache
        self._transfers: dict[int, _Transfer] = {}
        self._queues: dict[bool, deque[_Transfer]] = {False: deque(), True: deque()}
        self._threads: dict[bool, threading.Thread | None] = {False: None, True: None}
        self._changed = threading.Condition()
        self._ended = self._seen = 0
        pieces = max(1, BLOCK_BYTES // cache.piece_bytes)
        self._block_bytes = pieces * cache.piece_bytes
        self._staging = {writes: Staging(self._block_bytes, gpu=gpu) for writes in (False, True)}
        self._shape = [len(cache.layers), 2, *cache.layers[0].keys.shape[2:]]

    def begin(self, number: int, what: SegmentPages, *, writes: bool, ready: Callable[[], Any]) -> None:
        """Queues a transfer, out of the pages where it `writes`, else into them, under a number that none before it
        had. ready: returns when what the device was given before is done with the pages.
        """
        transfer = _Transfer(what, writes, ready)
        with self._changed:
            self._transfers[number] = transfer
            self._queues[writes].append(transfer)
            if self._threads[writes] is None:
                name = "store prefixes" if writes else "restore prefixes"
                thread = threading.Thread(target=self._work, args=(writes,), name=name, daemon=False)
                thread.start()
                self._threads[writes] = thread

    def state(self, number: int) -> int:
        """How many segments of a transfer, from its first one on, are whole; UNFINISHED while it goes on."""
        transfer = self._transfers[number]
        return transfer.done if transfer.is_over else UNFINISHED

    def bytes_of(self, number: int) -> int:
        """What has been read from or written to files."""
        return self._transfers[number].nbytes

    def give_up(self, number: int) -> None:
        """Ends a transfer, and forgets it: when this returns it touches no page any more."""
        transfer = self._transfers.pop(number)
        with transfer.lock:
            transfer.given_up = True
        self._staging[transfer.writes].wait()

    def forget(self, number: int) -> None:
        """Nobody asks for it any more."""
        del self._transfers[number]

    def wait(self, seconds: float) -> None:
        """Returns when a transfer has come to its end since this returned last, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended != self._seen, seconds)
            self._seen = self._ended

    def finish(self) -> None:
        """Returns when nothing is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not any(self._threads.values()))

    # --- the threads ---

    def _work(self, writes: bool) -> None:
        while True:
            with self._changed:
                if not self._queues[writes]:
                    self._threads[writes] = None
                    self._changed.notify_all()
                    return
                transfer = self._queues[writes].popleft()
            try:
                if not transfer.given_up:
                    transfer.ready()
                    self._write(transfer) if writes else self._read(transfer)
            except Exception:
                logger.exception("prefix store: a transfer failed")
            finally:
                with self._changed:
                    transfer.is_over = True
                    self._ended += 1
                    self._changed.notify_all()

    def _read(self, transfer: _Transfer) -> None:
        names = [segment.name for segment in transfer.what.segments]
        for segment in transfer.what.segments:
            try:
                whole = self._read_segment(transfer, segment)
            except SegmentError as error:
                self._store.ignore(segment.name, error)
                break
            if not whole:
                break
            transfer.done += 1
        self._store.touch(names[: transfer.done])

    def _read_segment(self, transfer: _Transfer, segment: StoredSegment) -> bool:
        """Whether all of it has come."""
        staging = self._staging[False]
        try:
            with self._store.open(segment.name, self._header(transfer.what, segment)) as reader:
                for number, runs in enumerate(self._blocks(transfer.what, segment)):
                    buffer = staging.next()
                    block = reader.read(number, buffer.memory)
                    with transfer.lock:
                        if transfer.given_up:
                            return False
                        for addresses, nbytes, offset in runs:
                            buffer.scatter(addresses, nbytes, offset)
                    transfer.nbytes += block.nbytes
        finally:
            staging.wait()
        return True

    def _write(self, transfer: _Transfer) -> None:
        for number, segment in enumerate(transfer.what.segments):
            used = time_of_use(transfer.what.queued, number)
            try:
                if not self._write_segment(transfer, segment, used):
                    return
            except OSError as error:
                self._store.say(f"{self._store.directory} takes no more: {error.strerror}")
                return
            self._store.touch([segment.name], used)
            transfer.done += 1

    def _write_segment(self, transfer: _Transfer, segment: StoredSegment, used: float) -> bool:
        """Whether it is there now."""
        writer = self._store.create(segment.name, self._header(transfer.what, segment), used)
        if writer is None:
            return self._store.path(segment.name).exists()
        staging = self._staging[True]
        with writer:
            for runs in self._blocks(transfer.what, segment):
                buffer = staging.next()
                with transfer.lock:
                    if transfer.given_up:
                        return False
                    for addresses, nbytes, offset in runs:
                        buffer.gather(addresses, nbytes, offset)
                    buffer.wait()
                block = buffer.memory[: offset + addresses.size * nbytes]
                writer.write(block)
                transfer.nbytes += block.nbytes
            writer.publish()
        return True

    def _header(self, what: SegmentPages, segment: StoredSegment) -> Header:
        """What its file says of itself."""
        tokens = segment.end - segment.begin
        return {
            "document": what.document,
            "made_under": what.made_under,
            "begin": segment.begin,
            "end": segment.end,
            "shape": self._shape,
            "dtype": self._cache.dtype,
            "data_bytes": tokens // self._cache.page_size * self._cache.page_bytes,
            "block_bytes": self._block_bytes,
        }

    def _blocks(self, what: SegmentPages, segment: StoredSegment) -> Iterator[list[Run]]:
        """The pieces of each block; those of pages before `first` are not wanted. Smaller pieces stand behind larger
        ones, which are multiples of them: a block holds a whole number of pieces of any size.
        """
        size = self._cache.page_size
        begin, end = max(0, segment.begin - what.first) // size, (segment.end - what.first) // size
        unwanted = max(0, what.first - segment.begin) // size
        block: list[Run] = []
        filled = 0
        for held, nbytes in self._cache.addresses(what.pages[begin:end]):
            addresses = np.pad(held, [(0, 0), (unwanted, 0)]).reshape(-1)
            while addresses.size:
                count = (self._block_bytes - filled) // nbytes
                block.append((addresses[:count], nbytes, filled))
                filled += block[-1][0].size * nbytes
                addresses = addresses[count:]
                if filled == self._block_bytes:
                    yield block
                    block, filled = [], 0
        if block:
            yield block
