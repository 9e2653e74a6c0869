"""Files that are either there and whole or not there: written under another name, synced, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY_SUFFIX = ".part"


def temporary(path: Path) -> Path:
    """The name under which `path` is written."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` where `path` is, in place of what is there. OSError leaves what was there, or nothing."""
    try:
        with temporary(path).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(path)
    except OSError:
        temporary(path).unlink(missing_ok=True)
        raise


def publish(path: Path) -> None:
    """Rename the synced temporary file to `path`, durably."""
    os.replace(temporary(path), path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
