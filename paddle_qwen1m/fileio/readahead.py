"""A file that is read from front to back: the kernel fetches what follows while this is worked on."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

AHEAD_BYTES = 64 << 20
REQUEST_BYTES = 2 << 20  # asked for at once; the kernel cuts off larger requests


class ReadAheadFile(io.FileIO):
    """Unbuffered, for reading. The kernel's own read-ahead waits for the reader, and spends time on large pages.

    descriptor: of the file, where it is open already; it is closed with this.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        super().__init__(path if descriptor is None else descriptor, "rb")
        self._requested = 0

    def readinto(self, buffer: Any) -> int:
        position = self.tell()
        needed = position + memoryview(buffer).nbytes
        if needed + AHEAD_BYTES // 2 > self._requested:
            end = needed + AHEAD_BYTES
            for begin in range(max(position, self._requested), end, REQUEST_BYTES):
                os.posix_fadvise(self.fileno(), begin, min(REQUEST_BYTES, end - begin), os.POSIX_FADV_WILLNEED)
            self._requested = end
        return super().readinto(buffer)
