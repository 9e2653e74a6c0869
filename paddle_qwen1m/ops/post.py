"""Values on their way between the host and the device that computes, which neither waits for."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from paddle_qwen1m.ops.library import call, library

ALIGNMENT = 64
NOT_READY = 600  # cudaErrorNotReady
SLICE_SECONDS = 0.5
"""Whoever waits without a limit gives Ctrl-C its turn so often."""


class _Struct(ctypes.Structure):
    """A parcel, see custom_ops/include/qwen1m/post.h."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("event", ctypes.c_void_p),
        ("device", ctypes.c_int32),
    )


class Parcel:
    """Host memory that the device copies to or from. Given back when nobody refers to it, also while a copy goes on."""

    def __init__(self, size: int, *, gpu: bool) -> None:
        take, self._give, self._await = _functions("cuda" if gpu else "cpu")
        self._struct = take(size)
        if not self._struct:
            raise MemoryError(f"the host has no {size:,} bytes of memory that a copy of the device could use")
        self.address = ctypes.addressof(self._struct.contents)

    def __del__(self) -> None:
        if getattr(self, "_struct", None):
            self._give(self._struct)

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """A part of the memory, which is the parcel's still."""
        count = math.prod(shape)
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(self._struct.contents.memory + offset)
        return np.frombuffer(memoryview(buffer), dtype).reshape(shape)

    def arrived(self, seconds: float) -> bool:
        """Whether the copies are done, within `seconds`. RuntimeError when what the device did before them failed."""
        status = self._await(self._struct, seconds)
        if status not in (0, NOT_READY):
            raise RuntimeError(f"the GPU stopped with CUDA error {status} in a step before this result")
        return bool(status == 0)


class Post:
    """What tensors hold when all that was queued before is done, on its way to the host.

    done: for whoever makes it to say whether something has come to its end with it.
    """

    def __init__(self, values: Sequence[paddle.Tensor], *, done: bool = True) -> None:
        self.done = done
        kinds = [(value.shape, np.dtype(str(value.dtype).rpartition(".")[2])) for value in values]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
        offsets = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        self._parcel = Parcel(offsets[-1], gpu=values[0].place.is_gpu_place())
        self._parts = [(offset, *kind) for offset, kind in zip(offsets, kinds)]
        for value, offset in zip(values, offsets):
            call("post", value, self._parcel.address, offset)

    def is_ready(self) -> bool:
        """Whether it has come; never waits."""
        return self._parcel.arrived(0.0)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for it, `seconds` at most, while other threads of Python run: whether it has come."""
        if seconds is not None:
            return self._parcel.arrived(seconds)
        while not self._parcel.arrived(SLICE_SECONDS):
            pass
        return True

    def result(self) -> tuple[np.ndarray, ...]:
        """The values, in the order of the tensors; waits for them."""
        self.wait()
        return tuple(self._parcel.array(*part).copy() for part in self._parts)


def upload(target: paddle.Tensor, values: np.ndarray) -> None:
    """Fills `target`, contiguous and of the same type and size, with `values`, behind all that was queued before."""
    assert target.shape == list(values.shape) and str(target.dtype).endswith(values.dtype.name)
    parcel = Parcel(values.nbytes, gpu=target.place.is_gpu_place())
    parcel.array(0, values.shape, values.dtype)[...] = values
    call("upload", target, parcel.address, 0)


def tensor(values: np.ndarray) -> paddle.Tensor:
    """A tensor that holds `values`, where tensors are made now."""
    made = paddle.empty(list(values.shape), values.dtype.name)
    upload(made, values)
    return made


@functools.cache
def _functions(device: str) -> tuple[Any, Any, Any]:
    """How parcels of a device are taken, given back and waited for."""
    names = library()
    take = getattr(names, f"qwen1m_{device}_take_parcel")
    take.argtypes, take.restype = (ctypes.c_int64,), ctypes.POINTER(_Struct)
    give = getattr(names, f"qwen1m_{device}_give_parcel")
    give.argtypes, give.restype = (ctypes.POINTER(_Struct),), None
    wait = getattr(names, f"qwen1m_{device}_await_parcel")
    wait.argtypes, wait.restype = (ctypes.POINTER(_Struct), ctypes.c_double), ctypes.c_int
    return take, give, wait
