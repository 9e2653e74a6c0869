"""The mailboxes of all ranks' cards, through which the sums of few rows go."""

from __future__ import annotations

import os
from typing import NamedTuple

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.parallel.peers import Peers, Store

MAILBOXES = "PADDLE_QWEN1M_MAILBOXES"
"""Environment variable: 0 leaves the sums of few rows to NCCL; of one rank it counts for all."""


class Sent(NamedTuple):
    """A rank's part of a sum [T, N] that the others have been sent: the next sum is that one."""

    values: paddle.Tensor


class Mailboxes(NamedTuple):
    """The addresses of all ranks' mailboxes in this process."""

    boxes: list[int]
    rank: int

    def take(self, rows: int, width: int) -> bool:
        """Whether they have room for so many rows of so many values."""
        return rows <= ops.MAILBOX_ROWS and width <= ops.MAILBOX_WIDTH

    def product(self, x: paddle.Tensor, weight: paddle.Tensor) -> Sent:
        """`ops.linear` of up to FEW_ROWS rows by a weight that has not 8 bits."""
        return Sent(ops.sending_linear(x, weight, self.boxes, self.rank))

    def add_rms_norm(
        self, values: paddle.Tensor | Sent, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
    ) -> paddle.Tensor:
        """`ops.add_rms_norm` of the ranks' sum of `values` [T, N]."""
        delta, sent = (values.values, True) if isinstance(values, Sent) else (values, False)
        return ops.sum_rms_norm(delta, residual, weight, eps, self.boxes, self.rank, sent=sent)


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
