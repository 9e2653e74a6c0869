"""What benchmarks measure the device by: queued calls, and by the driver, marks in the stream and copies beside it."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from typing import Any, Callable

import paddle

BESIDE_OTHERS = 1
"""Of a stream that does not wait for the default one."""
WITHOUT_TIME = 2
"""Of an event that is only waited for."""


def seconds_a_call(call: Callable[[], object], calls: int) -> float:
    """Of what is queued call after call, behind a first one that is not counted."""
    call()
    paddle.device.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    paddle.device.cuda.synchronize()
    return (time.perf_counter() - start) / calls


class Driver:
    """libcuda's functions, with the stream of Paddle's computation."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self.computation = ctypes.c_void_p(paddle.device.cuda.current_stream().cuda_stream)

    def call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {status}")

    def mark(self, stream: ctypes.c_void_p, flags: int = 0) -> ctypes.c_void_p:
        """An event behind what is queued on a stream."""
        event = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(event), flags)
        self.call("cuEventRecord", event, stream)
        return event


class DeviceClock:
    """Points of the computation's stream; marking one waits for nothing."""

    def __init__(self) -> None:
        self._driver = Driver()

    def mark(self) -> Any:
        return self._driver.mark(self._driver.computation)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks, both of which the device has passed."""
        elapsed = ctypes.c_float()
        self._driver.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value


class Carrier:
    """Copies from pinned memory to the device on a stream of its own, beside the computation."""

    def __init__(self) -> None:
        self._driver = Driver()
        self._stream = ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(self._stream), BESIDE_OTHERS)

    def send(self, pinned: Sequence[paddle.Tensor], targets: Sequence[paddle.Tensor]) -> Any:
        """Copies each to its target, of the same size, once the computation that is queued has left the targets alone.
        Both stay as they are until `receive` has been called with what this returns.
        """
        self._wait(self._stream, self._driver.mark(self._driver.computation, WITHOUT_TIME))
        for source, target in zip(pinned, targets):
            count = ctypes.c_size_t(math.prod(source.shape) * source.element_size())
            addresses = ctypes.c_uint64(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
            self._driver.call("cuMemcpyHtoDAsync_v2", *addresses, count, self._stream)
        return self._driver.mark(self._stream, WITHOUT_TIME)

    def receive(self, sent: Any) -> None:
        """The computation goes on once the targets are filled."""
        self._wait(self._driver.computation, sent)

    def _wait(self, stream: ctypes.c_void_p, event: Any) -> None:
        self._driver.call("cuStreamWaitEvent", stream, event, 0)
        self._driver.call("cuEventDestroy_v2", event)
