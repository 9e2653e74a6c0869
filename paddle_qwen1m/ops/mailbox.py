"""Sums of a few rows over ranks whose cards write to each other's memory: mailboxes, and the norm that has the sum."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import paddle

from paddle_qwen1m.ops.library import call, library
from paddle_qwen1m.ops.peers import check

MAILBOX_ROWS = 64
MAILBOX_WIDTH = 6144
"""The most rows of a sum, and values of a row (custom_ops/include/qwen1m/mailbox.h)."""


def sum_rms_norm(
    delta: paddle.Tensor,
    residual: paddle.Tensor,
    weight: paddle.Tensor,
    eps: float,
    boxes: Sequence[int],
    rank: int,
    *,
    sent: bool = False,
) -> paddle.Tensor:
    """`add_rms_norm` of the sum over all ranks of their `delta` [T, N], bit by bit the same on each. On a GPU alone.

    boxes: the address of every rank's mailbox in this process, the own one at `rank`. All ranks call it as often, and
    for as many rows. sent: whether `sending_linear` made the delta.
    """
    return call("sum_rms_norm", delta, residual, weight, eps, list(boxes), rank, sent)[1]


def sending_linear(x: paddle.Tensor, weight: paddle.Tensor, boxes: Sequence[int], rank: int) -> paddle.Tensor:
    """`linear` of up to FEW_ROWS rows [T, K], which sends this rank's delta of the sum that comes next as it is made:
    [T, N]. On a GPU alone.
    """
    return call("sending_linear", x, weight, list(boxes), rank)[0]


def make_mailbox(degree: int) -> int:
    """The address of a new mailbox for `degree` ranks on the current device, which is there until this process ends.
    OSError where there is no memory for it.
    """
    address = ctypes.c_int64()
    check("make_mailbox", library().qwen1m_cuda_make_mailbox(degree, ctypes.byref(address)))
    return address.value
