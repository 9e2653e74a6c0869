"""Pieces of the device's memory on their way to host buffers and back, beside whatever is computed."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from paddle_qwen1m.ops.library import library
from paddle_qwen1m.ops.post import SLICE_SECONDS, Parcel


class _Pieces(ctypes.Structure):
    """See custom_ops/include/qwen1m/pieces.h."""

    _fields_ = (
        ("pieces", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("parcel", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
    )


class PieceBuffer:
    """Host memory of `size` bytes, pinned where a GPU copies to or from it. To be made by a thread whose current device
    that is; any thread may use it then, one at a time.
    """

    def __init__(self, size: int, *, gpu: bool) -> None:
        self._device = "cuda" if gpu else "cpu"
        self._parcel = Parcel(size, gpu=gpu)
        self.memory = self._parcel.array(0, (size,), np.dtype(np.uint8))
        """uint8 [size]"""

    def gather(self, addresses: np.ndarray, nbytes: int, offset: int = 0) -> None:
        """Fills the buffer, from `offset` on, with pieces of `nbytes` each at int64 addresses of the device, 0 for
        none; see `wait`.
        """
        self._copy("gather", addresses, nbytes, offset)

    def scatter(self, addresses: np.ndarray, nbytes: int, offset: int = 0) -> None:
        """Copies what is in the buffer, from `offset` on, piece by piece to these addresses; see `wait`."""
        self._copy("scatter", addresses, nbytes, offset)

    def wait(self) -> None:
        """Returns when the copies are done."""
        while not self._parcel.arrived(SLICE_SECONDS):
            pass

    def _copy(self, direction: str, addresses: np.ndarray, nbytes: int, offset: int) -> None:
        where = np.ascontiguousarray(addresses, np.int64)
        assert offset + where.size * nbytes <= self.memory.size
        pieces = _Pieces(where.ctypes.data, where.size, nbytes, self._parcel.address, offset)
        status = _function(self._device, direction)(ctypes.byref(pieces))
        if status:
            raise RuntimeError(f"copying between the host and the GPU failed with CUDA error {status}")


@functools.cache
def _function(device: str, direction: str) -> Any:
    function = getattr(library(), f"qwen1m_{device}_{direction}")
    function.argtypes, function.restype = (ctypes.POINTER(_Pieces),), ctypes.c_int
    return function
