"""Columns of a matrix in a file."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np

from paddle_qwen1m.ops.library import library


class _Read(ctypes.Structure):
    """See custom_ops/include/qwen1m/files.h."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("position", "rows", "bytes", "pitch", "out_pitch", "done")),
        ("descriptor", ctypes.c_int32),
    )


def read_rows(descriptor: int, position: int, pitch: int, out: np.ndarray) -> int:
    """Fills `out` uint8 [rows, bytes], each row contiguous, from a file: row i lies at byte position + i * pitch.

    Returns how many bytes were read, fewer where the file ends before. OSError when reading fails. Other threads of
    Python run meanwhile.
    """
    assert out.dtype == np.uint8 and out.strides[1] == 1
    rows, nbytes = out.shape
    read = _Read(out.ctypes.data, position, rows, nbytes, pitch, out.strides[0], 0, descriptor)
    status = _function()(ctypes.byref(read))
    if status:
        raise OSError(status, os.strerror(status))
    return int(read.done)


@functools.cache
def _function() -> Any:
    function = library().qwen1m_cpu_read_rows
    function.argtypes, function.restype = (ctypes.POINTER(_Read),), ctypes.c_int
    return function
