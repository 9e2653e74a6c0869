"""An exception of one process, told to another and raised there."""

from __future__ import annotations

import traceback
from typing import Any

from paddle_qwen1m.cache import CacheFull
from paddle_qwen1m.engine import NotEnoughMemory
from paddle_qwen1m.parallel.job import JobEnded, StartError
from paddle_qwen1m.weights import CheckpointError

KNOWN: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        CacheFull, CheckpointError, FileNotFoundError, ImportError, IsADirectoryError, JobEnded, MemoryError,
        NotADirectoryError, NotEnoughMemory, NotImplementedError, OSError, PermissionError, StartError, TypeError,
        ValueError,
    )
}  # fmt: skip
"""What callers tell apart; whatever else there is becomes a RuntimeError that shows where it came from."""


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def describe(error: BaseException) -> dict[str, Any]:
    """The exception as a message has it."""
    return {
        "types": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }


def is_known(told: dict[str, Any]) -> bool:
    """Whether callers tell exceptions of its type apart."""
    return any(name in KNOWN for name in told["types"])


def is_echo(told: dict[str, Any]) -> bool:
    """Whether it only says that another process has failed."""
    return JobEnded.__name__ in told["types"]


def rebuild(told: dict[str, Any], where: str) -> Exception:
    """An exception of the same type and text where its type is known, else one that names the process, `where`."""
    for name in told["types"]:
        if name in KNOWN:
            return KNOWN[name](told["text"])
    return caused(RuntimeError(f"{where}: {summary(told)}"), told)


def caused(error: Exception, told: dict[str, Any]) -> Exception:
    """`error`, which shows the traceback of what was told."""
    error.__cause__ = RemoteTraceback(told["traceback"])
    return error


def summary(told: dict[str, Any]) -> str:
    """One line, as the end of a traceback has it."""
    return f"{told['types'][0]}: {told['text']}" if told["text"] else str(told["types"][0])
