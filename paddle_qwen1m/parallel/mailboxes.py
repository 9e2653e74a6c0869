"""How the ranks of one machine come to the mailboxes of each other's cards: all of them, or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from paddle_qwen1m import ops

MAILBOXES = "PADDLE_QWEN1M_MAILBOXES"
"""Environment variable: 0 leaves the sums of few rows to NCCL, as those of many are; of one rank it counts for all."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NONE = "none"


class Store(Protocol):
    """Texts by key, the same for all ranks: Paddle's TCPStore. `get` waits until one is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Mailboxes(NamedTuple):
    """The addresses of all ranks' mailboxes in this process."""

    boxes: list[int]
    rank: int

    def take(self, rows: int, width: int) -> bool:
        """Whether they have room for so many rows of so many values."""
        return rows <= ops.MAILBOX_ROWS and width <= ops.MAILBOX_WIDTH


def open_mailboxes(store: Store, rank: int, degree: int) -> Mailboxes | None:
    """The mailboxes of all ranks, which all call it once; None on all where one cannot reach another's."""
    own = _make(degree) if degree <= ops.MAILBOX_RANKS and os.environ.get(MAILBOXES) != "0" else None
    machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else NONE
    names = _exchange(store, "name", rank, degree, NONE if own is None else f"{machine} {own[1].hex()}")
    if own is None or machine == NONE or not all(name.startswith(f"{machine} ") for name in names):
        return None
    boxes = [own[0] if other == rank else _open(name.split()[1]) for other, name in enumerate(names)]
    reached = _exchange(store, "reached", rank, degree, NONE if None in boxes else "all")
    return Mailboxes([box for box in boxes if box is not None], rank) if NONE not in reached else None


def _exchange(store: Store, what: str, rank: int, degree: int, own: str) -> list[str]:
    """What every rank says."""
    store.set(f"mailboxes/{what}/{rank}", own)
    return [store.get(f"mailboxes/{what}/{other}").decode() for other in range(degree)]


def _make(degree: int) -> tuple[int, bytes] | None:
    try:
        return ops.make_mailbox(degree)
    except OSError:
        return None


def _open(name: str) -> int | None:
    try:
        return ops.open_mailbox(bytes.fromhex(name))
    except OSError:
        return None
