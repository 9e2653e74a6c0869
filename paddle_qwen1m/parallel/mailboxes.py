"""The mailboxes of all ranks' cards, through which the sums of few rows go."""

from __future__ import annotations

import os
from typing import NamedTuple

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.peers import Peers, Store

MAILBOXES = "PADDLE_QWEN1M_MAILBOXES"
"""Environment variable: 0 leaves the sums of few rows to NCCL; of one rank it counts for all."""


class Mailboxes(NamedTuple):
    """The addresses of all ranks' mailboxes in this process."""

    boxes: list[int]
    rank: int

    def take(self, rows: int, width: int) -> bool:
        """Whether they have room for so many rows of so many values."""
        return rows <= ops.MAILBOX_ROWS and width <= ops.MAILBOX_WIDTH


def open_mailboxes(store: Store, rank: int, degree: int) -> Mailboxes | None:
    """The mailboxes of all ranks, which all call it once; None on all where one cannot reach another's."""
    own = _make(degree) if degree <= ops.PEER_RANKS and os.environ.get(MAILBOXES) != "0" else None
    boxes = Peers(store, "mailboxes", rank, degree).reach(own)
    return None if boxes is None else Mailboxes(boxes, rank)


def _make(degree: int) -> int | None:
    try:
        return ops.make_mailbox(degree)
    except OSError:
        return None
