"""Memory of the other ranks of one machine: how it is found, rows that go there beside the computation, their sums."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import paddle

from paddle_qwen1m.ops.library import call, library

PEER_RANKS = 8
"""The most ranks that find each other's memory."""
PEER_NUMBERS = 256
"""That flags can hold (custom_ops/include/qwen1m/peers.h)."""
COPIER_MARKS = 8
"""Of a copier."""
NAME_BYTES = 64


def send_rows(
    values: paddle.Tensor,
    copier: int,
    sources: Sequence[int],
    targets: Sequence[int],
    flags: Sequence[int],
    size: int,
    number: int,
    mark: int,
) -> None:
    """Copies `size` bytes from each source to its target, an address in another rank's memory, and then `number` to its
    flag, uint32: on the copier's stream, behind what is queued on the computation's. On a CPU at once.

    values: whose device this is; the sources must stay as they are until they have been copied. That is the copier's
    `mark`, below COPIER_MARKS, until something else is sent under it.
    """
    call("send_rows", values, copier, list(sources), list(targets), list(flags), size, number, mark)


def await_rows(values: paddle.Tensor, copier: int, flags: Sequence[int], number: int, mark: int) -> None:
    """What is queued from now on comes behind what others copy here, when `number` is in all of this rank's flags; with
    a copier that is not 0 also behind its `mark`. A host that computes on a GPU does not wait.
    """
    call("await_rows", values, copier, list(flags), number, mark)


def parts_rms_norm(
    delta: paddle.Tensor,
    residual: paddle.Tensor,
    weight: paddle.Tensor,
    eps: float,
    parts: paddle.Tensor,
    first: int,
    rank: int,
    out: paddle.Tensor,
) -> None:
    """`add_rms_norm`, into `out` [T, N], of the sum of `delta` [T, N], which is that of `rank`, and of the other ranks'
    in `parts` [degree - 1, rows, N] from row `first` on; the sum is of float32, in the order of the ranks.
    """
    call("parts_rms_norm", delta, residual, weight, parts, out, eps, first, rank)


def make_copier() -> int:
    """What copies for the current GPU until this process ends. OSError where CUDA has none."""
    copier = ctypes.c_int64()
    check("make_copier", library().qwen1m_cuda_make_copier(ctypes.byref(copier)))
    return copier.value


def name_memory(address: int) -> tuple[bytes, int]:
    """The name by which other processes of the machine open the allocation that an address of the current GPU lies in,
    and how many bytes that is behind its beginning. OSError where the driver shares no memory.
    """
    name, offset = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_int64()
    check("name_memory", library().qwen1m_cuda_name_memory(ctypes.c_int64(address), name, ctypes.byref(offset)))
    return name.raw, offset.value


def open_memory(name: bytes) -> int:
    """Where another process's allocation begins. OSError where the cards cannot reach each other's memory."""
    address = ctypes.c_int64()
    check("open_memory", library().qwen1m_cuda_open_memory(name, ctypes.byref(address)))
    return address.value


def check(what: str, status: int) -> None:
    """OSError for a status of CUDA that is not a success."""
    if status != 0:
        raise OSError(f"{what}: CUDA error {status}")
