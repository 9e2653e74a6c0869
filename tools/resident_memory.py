"""Resident memory of this process on Linux: now, and its peak since a reset."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident memory now."""
    return _field("VmRSS")


def reset_peak() -> None:
    """Forget the peak so far: `peak_bytes` then counts from now on."""
    _CLEAR.write_text("5")


def peak_bytes() -> int:
    """The most that was resident at once since `reset_peak`, or since the process began."""
    return _field("VmHWM")


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no line {name}: memory is measured on Linux only")
    return int(found.group(1)) * 1024
