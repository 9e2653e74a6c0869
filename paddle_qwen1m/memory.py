"""How much memory there is, and how much of it this process can still take."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Of version 2 and 1: limit, use, and in memory.stat beside them the part of the use that is copies of files, which the
kernel drops when memory is wanted."""
GPU_SHARE = 0.96
"""Of a GPU's memory; the rest is the driver's context, the libraries' buffers and what allocators round up."""


def available_host_memory() -> int | None:
    """Bytes of host memory that the kernel or a container's limit leaves to this process; None where neither says.

    Processes that a launcher started on one machine share them equally.
    """
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    for limit, used, droppable in CGROUP_FILES:
        if os.path.exists(limit) and os.path.exists(used):
            text = Path(limit).read_text(encoding="ascii").strip()
            if text.isdigit():
                taken = int(Path(used).read_text(encoding="ascii")) - _statistic(
                    Path(used).with_name("memory.stat"), droppable
                )
                found.append(max(0, int(text) - taken))
    sharers = os.environ.get("PADDLE_LOCAL_SIZE", "")
    return min(found) // (int(sharers) if sharers.isdigit() and int(sharers) > 0 else 1) if found else None


def _statistic(path: Path, name: str) -> int:
    """A number of a cgroup's memory.stat; 0 where it has none."""
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def available_gpu_memory() -> int:
    """Bytes of Paddle's GPU that this process has not allocated, less what is never to be had."""
    import paddle

    cuda = paddle.device.cuda
    return int(GPU_SHARE * cuda.get_device_properties().total_memory) - int(cuda.memory_allocated())


@contextmanager
def kept_in_one_piece(size: int) -> Iterator[None]:
    """Makes Paddle's allocator take `size` bytes of its GPU and keep them. What is made meanwhile lies elsewhere; from
    then on tensors of whatever sizes are made in that piece, where many, each as large as what came first, would leave
    room between them.
    """
    import paddle

    paddle.device.cuda.empty_cache()
    piece = paddle.empty([size], "uint8")
    yield
    del piece


class DriverMemory(NamedTuple):
    """Bytes of a GPU's memory that nobody has, and of all of it."""

    free: int
    total: int


def driver_memory() -> DriverMemory:
    """What the driver says of Paddle's GPU, whoever holds its memory. OSError where it does not say."""
    import paddle

    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    number = int(paddle.device.get_device().partition(":")[2])

    def call(name: str, *arguments: object) -> None:
        status = getattr(driver, name)(*arguments)
        if status != 0:
            raise OSError(f"the driver does not say how much memory GPU {number} has: {name} returned {status}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), number)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # Paddle's own, or made for it
    call("cuCtxPushCurrent_v2", context)
    try:
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(context))
    return DriverMemory(free.value, total.value)
