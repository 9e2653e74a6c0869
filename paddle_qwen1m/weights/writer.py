"""Writes, hashes and syncs files of weights, each on a thread of its own, while more is being read."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import numpy as np

from paddle_qwen1m.fileio.durable import temporary

from .safetensors import Array

Piece = tuple["Future[None]", "Future[None]"]  # written, hashed
WRITE_BYTES = 128 << 10  # larger ones make Linux look for large free pages, which costs it twice the time
QUEUED = 64  # pieces that wait to be written
UNSYNCED = 16  # files that wait to be synced


class OutputFile:
    """One file under its temporary name, written from beginning to end; once a write failed, so does all that follows.

    `nbytes`: what is written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self.sha256 = hashlib.sha256()
        self._failure: OSError | None = None
        self._descriptor: int | None = os.open(temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: memoryview) -> None:
        """Append; OSError."""
        assert self._descriptor is not None
        self._refuse_after_a_failure()
        try:
            while data:
                done = os.write(self._descriptor, data[:WRITE_BYTES])
                if not done:
                    raise OSError(errno.EIO, "the disk takes no more of it")
                self.nbytes += done
                data = data[done:]
        except OSError as failure:
            self._failure = failure
            raise

    def sync(self) -> None:
        """Returns when all of it is on the disk; OSError when it is not, a write that failed earlier included."""
        assert self._descriptor is not None
        self._refuse_after_a_failure()
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def discard(self) -> None:
        """Close it and remove it, whatever state it is in."""
        with suppress(OSError):
            self.close()
        temporary(self.path).unlink(missing_ok=True)

    def _refuse_after_a_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class Writer:
    """A context: `put` and `finish` return at once, errors come up in a later call or at the end.

    `publish` is called, one file after the other, with each file that is whole and synced. When the context is left
    with an error, files that are not published are removed.
    """

    def __init__(self, publish: Callable[[OutputFile], None]) -> None:
        self._publish = publish
        self._writing = ThreadPoolExecutor(1, "write")
        self._hashing = ThreadPoolExecutor(1, "hash")
        self._syncing = ThreadPoolExecutor(1, "sync")
        self._pieces: deque[Future[Any]] = deque()
        self._syncs: deque[Future[Any]] = deque()
        self._open: set[OutputFile] = set()

    def open(self, path: Path) -> OutputFile:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = OutputFile(path)
        self._open.add(file)
        return file

    def put(self, file: OutputFile, data: memoryview) -> Piece:
        """Append to a file. `data` must not change before both futures are done."""
        _wait(self._pieces, QUEUED)
        piece = self._writing.submit(file.write, data), self._hashing.submit(file.sha256.update, data)
        self._pieces.extend(piece)
        return piece

    def finish(self, file: OutputFile) -> None:
        """Sync and publish a file once all that was put is written; never when a write of it failed."""
        _wait(self._syncs, UNSYNCED)
        hashed = self._hashing.submit(file.sha256.digest)
        self._pieces.append(self._writing.submit(self._hand_over, file, hashed))

    def _hand_over(self, file: OutputFile, hashed: Future[bytes]) -> None:
        self._syncs.append(self._syncing.submit(self._complete, file, hashed))

    def _complete(self, file: OutputFile, hashed: Future[bytes]) -> None:
        file.sync()
        hashed.result()
        self._publish(file)
        self._open.discard(file)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        try:
            if kind is None:
                _wait(self._pieces, 0)
                _wait(self._syncs, 0)
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._hashing.shutdown(cancel_futures=True)
            self._syncing.shutdown(cancel_futures=True)
            for file in self._open:
                file.discard()


class Buffers:
    """A ring of arrays to fill and put, used again once they are written: fresh memory costs as much as filling it."""

    def __init__(self, count: int) -> None:
        self._ring: deque[tuple[Array, Piece | None]] = deque([(np.empty(0, np.uint8), None)] * count)

    def take(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        """An array in the buffer that was given back first; waits until that one is written."""
        buffer, piece = self._ring[0]
        for future in piece or ():
            future.result()
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if buffer.nbytes < nbytes:
            buffer = np.empty(nbytes, np.uint8)
        self._ring[0] = buffer, None
        return buffer[:nbytes].view(dtype).reshape(shape)

    def give_back(self, last: Piece | None) -> None:
        """What was taken last is free once the last piece that was put of it is done."""
        self._ring[0] = self._ring[0][0], last
        self._ring.rotate(-1)


def _wait(futures: deque[Future[Any]], most: int) -> None:
    """Until at most that many are under way; raises what one of them raised."""
    while futures and (len(futures) > most or futures[0].done()):
        futures.popleft().result()
