"""A file that is read in many places: by columns of what lies in it row by row, and ahead of whoever reads it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

REQUEST_BYTES = 2 << 20  # asked for at once; the kernel cuts off larger requests


class RowFile(io.FileIO):
    """Unbuffered, for reading, by one thread at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")

    def read_rows(self, position: int, pitch: int, out: np.ndarray) -> int:
        """Fills `out` uint8 [rows, bytes]: row i lies at byte position + i * pitch. Returns how many bytes came."""
        from paddle_qwen1m import ops

        return ops.read_rows(self.fileno(), position, pitch, out)

    def fetch(self, begin: int, end: int) -> None:
        """Has the kernel fetch bytes [begin, end) from the disk, and does not wait for them."""
        for start in range(begin, end, REQUEST_BYTES):
            os.posix_fadvise(self.fileno(), start, min(REQUEST_BYTES, end - start), os.POSIX_FADV_WILLNEED)
