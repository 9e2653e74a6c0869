"""How much memory this process can still take."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
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
    for limit, used in zip(CGROUP_LIMITS, CGROUP_USED):
        if os.path.exists(limit) and os.path.exists(used):
            text = Path(limit).read_text(encoding="ascii").strip()
            if text.isdigit():
                found.append(max(0, int(text) - int(Path(used).read_text(encoding="ascii"))))
    sharers = os.environ.get("PADDLE_LOCAL_SIZE", "")
    return min(found) // (int(sharers) if sharers.isdigit() and int(sharers) > 0 else 1) if found else None


def available_gpu_memory() -> int:
    """Bytes of Paddle's GPU that this process has not allocated, less what is never to be had."""
    import paddle

    cuda = paddle.device.cuda
    return int(GPU_SHARE * cuda.get_device_properties().total_memory) - int(cuda.memory_allocated())
