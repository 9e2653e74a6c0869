"""The tensor parallel group of this process: its rank, and the collectives of a forward pass.

On a CPU they go through gloo, on a GPU through NCCL: on the stream of the computation, where a CUDA graph captures
them, but for those of a prefill's lanes, which are on the library's own stream beside it. Where the cards reach each
other's memory, sums of few rows, two a layer of every decode step, go through mailboxes, and what a prefill's lanes
send is copied.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.base import core

from paddle_qwen1m import ops
from paddle_qwen1m.ops.library import library
from paddle_qwen1m.parallel.copies import Copies, open_copies
from paddle_qwen1m.parallel.job import (
    Job,
    await_listener,
    end_with_the_launcher,
    free_port,
    join,
    launched_rank,
    launched_ranks,
)
from paddle_qwen1m.parallel.mailboxes import Mailboxes, Sent, open_mailboxes
from paddle_qwen1m.parallel.peers import Peers
from paddle_qwen1m.parallel.pending import Pending
from paddle_qwen1m.parallel.room import lanes_of

GROUP_OF_ONE = "PADDLE_QWEN1M_GROUP_OF_ONE"
"""Environment variable: 1 sends the collectives of one rank through a real process group."""
GPU_LANE_ROWS, CPU_LANE_ROWS = 4096, 64
"""Least rows of a lane of several: on a GPU the host takes longer to queue a layer's lanes than products of fewer rows
take. On a CPU lanes gain nothing, and are the same code.
"""
FIRST_VALUES = (1, 1 << 14, 1 << 18, 1 << 22)
"""Float32 numbers of each rank in the first collectives."""
LAUNCH = "python -m paddle.distributed.launch"


class Group:
    """One rank alone: nothing is reduced, gathered or shared."""

    rank = 0
    degree = 1
    adds_up = False
    """Whether others have parts of what a product gives."""

    def all_reduce(self, values: paddle.Tensor) -> paddle.Tensor:
        """`values`, contiguous, replaced by their sum over all ranks."""
        return values

    def add_rms_norm(
        self, values: paddle.Tensor | Sent, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
    ) -> paddle.Tensor:
        """`ops.add_rms_norm` of the sum over all ranks of `values` [T, N], contiguous, which may be overwritten."""
        assert not isinstance(values, Sent), "nobody sends where there are no mailboxes"
        return ops.add_rms_norm(self.all_reduce(values), residual, weight, eps)

    def mailboxes(self, rows: int, width: int) -> Mailboxes | None:
        """By which products of so many rows of `width` values may send what they make, for `add_rms_norm`; None: by
        none.
        """
        return None

    def lanes(self, rows: int) -> int:
        """In how many lanes so many rows of a step go between ranks (lanes.py): one where they are few or do not divide
        by degree.
        """
        return 1

    def open_copies(self, rows: int, width: int, dtype: str) -> None:
        """Makes room for lanes of steps of up to so many rows of `width` activations, where ranks can copy into each
        other's. All ranks call it.
        """

    def lend_copies(self, rows: int, width: int) -> Copies | None:
        """What the lanes of a step of so many rows of `width` activations go by, from now until it is given back; None:
        collectives.
        """
        return None

    def padded(self, rows: int) -> int:
        """`rows` and as many more as make several lanes of them possible, where that is worth it."""
        return rows

    def reduce_scatter(self, values: paddle.Tensor) -> Pending:
        """Of the sum of the ranks' `values` [degree * n, N], contiguous, this rank's n rows: [n, N]."""
        return Pending(values)

    def all_gather(self, values: paddle.Tensor, out: paddle.Tensor) -> Pending:
        """`out` [degree * n, N], contiguous, filled with the ranks' `values` [n, N], one rank's below the other's."""
        out.copy_(values, False)
        return Pending(out)

    def gather_columns(self, values: paddle.Tensor, columns: int) -> paddle.Tensor:
        """The ranks' `values` float32 [n, share] side by side, the first `columns` of them: [n, columns]."""
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank: numbers, text, lists and dicts, through the host."""
        return value

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values. A rank may come as late as it likes, which in a collective is a stall."""
        return value

    def add_up(self, done: int, total: int) -> tuple[int, int]:
        """On rank 0 the sum of what it and the others said last of a piece of work, on these of what they say.

        Waits for nobody, so that the others' is as old as their last call.
        """
        return done, total

    def meet(self) -> None:
        """Returns when every rank has called it."""
        self.smallest(0)

    def mark(self, values: paddle.Tensor, *, replayed: bool = False) -> None:
        """For others to see that this rank gets on: `values` are a layer's output, or `replayed`, that of a graph."""

    def fail(self, reason: str, status: int) -> int:
        """Says why this rank cannot go on; ends the process with `status` where there are others, and them too."""
        print(f"error: {reason}", file=sys.stderr)
        return status


ALONE = Group()


class ProcessGroup(Group):
    """Ranks that a launcher started; `job` is None for a group of one."""

    adds_up = True

    def __init__(self, job: Job | None) -> None:
        self.rank, self.degree = (job.rank, job.degree) if job is not None else (0, 1)
        self.job = job
        self._on_gpu = ops.on_gpu()
        self._lane_rows = GPU_LANE_ROWS if self._on_gpu else CPU_LANE_ROWS
        self._library = library()
        address, port = job.store_address if job is not None else ("127.0.0.1", free_port("127.0.0.1"))
        os.environ.setdefault("PADDLE_TRAINER_ID", str(self.rank))  # Paddle's groups ask for it
        paddle_core: Any = core  # ProcessGroupNCCL is in builds with CUDA alone
        kind = paddle_core.ProcessGroupNCCL if self._on_gpu else paddle_core.ProcessGroupGloo
        if self.rank != 0:
            await_listener(address, port)
        self._store = core.TCPStore(address, port, self.rank == 0, self.degree)
        # Paddle wants a number that no other group of this process ever had, the same on all ranks, and fleet's count
        # from 0.
        self._group = kind.create(self._store, self.rank, self.degree, port)
        if self._on_gpu:
            self._take_buffers()
            paddle.device.cuda.synchronize()
            paddle.device.cuda.empty_cache()
        self._mailboxes = open_mailboxes(self._store, self.rank, self.degree) if self._on_gpu and job else None
        self._copies: dict[int, Copies | None] = {}
        self._copied_rows: dict[int, int] = {}
        keep = weakref.WeakMethod(self._keep)
        os.register_at_fork(after_in_child=lambda: (call := keep()) is not None and call())

    def _take_buffers(self) -> None:
        """Every kind of collective once, of few values and of many. NCCL takes buffers where it first goes a way, which
        depends on both: so that is before anybody asks how much memory is free.
        """
        for values in FIRST_VALUES:
            of_all = paddle.empty([self.degree * values, 1], "float32")
            own = self.reduce_scatter(self.all_reduce(of_all)).wait()
            self.all_gather(own, of_all).wait()

    def all_reduce(self, values: paddle.Tensor) -> paddle.Tensor:
        with self._collective():
            if self._on_gpu:
                self._group.all_reduce_on_calc_stream(values, core.ReduceOp.SUM)
            else:
                self._group.all_reduce(values, core.ReduceOp.SUM, True).wait()
        return values

    def add_rms_norm(
        self, values: paddle.Tensor | Sent, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
    ) -> paddle.Tensor:
        if self._mailboxes is None or not self._mailboxes.take(*residual.shape):
            return super().add_rms_norm(values, residual, weight, eps)
        with self._collective():
            return self._mailboxes.add_rms_norm(values, residual, weight, eps)

    def mailboxes(self, rows: int, width: int) -> Mailboxes | None:
        fits = self._mailboxes is not None and self._mailboxes.take(rows, width) and rows <= ops.FEW_ROWS
        return self._mailboxes if fits else None

    def lanes(self, rows: int) -> int:
        return 1 if rows % self.degree else lanes_of(rows, self._lane_rows)

    def open_copies(self, rows: int, width: int, dtype: str) -> None:
        if not self._on_gpu or self.job is None or rows <= self._copied_rows.get(width, 0):
            return
        peers = Peers(self._store, f"copies of {rows} rows of {width}", self.rank, self.degree)
        self._copies[width], self._copied_rows[width] = None, rows
        self._copies[width] = open_copies(peers, rows, width, dtype, self._collective)

    def lend_copies(self, rows: int, width: int) -> Copies | None:
        copies = self._copies.get(width)
        return copies if copies is not None and copies.lend(rows) else None

    def padded(self, rows: int) -> int:
        padded = -(-rows // self.degree) * self.degree
        return padded if self.lanes(padded) > 1 else rows

    def reduce_scatter(self, values: paddle.Tensor) -> Pending:
        share = values.shape[0] // self.degree
        if not self._on_gpu:  # gloo has none
            return Pending(self.all_reduce(values)[self.rank * share : (self.rank + 1) * share])
        own = paddle.empty([share, values.shape[1]], values.dtype)
        with self._collective():
            task = self._group.reduce_scatter_tensor(own, values, core.ReduceOp.SUM, False)
        return Pending(own, task, values)

    def all_gather(self, values: paddle.Tensor, out: paddle.Tensor) -> Pending:
        with self._collective():
            task = self._group.all_gather_into_tensor(out, values, not self._on_gpu)
            if not self._on_gpu:
                task.wait()
        return Pending(out, task if self._on_gpu else None, values)

    def gather_columns(self, values: paddle.Tensor, columns: int) -> paddle.Tensor:
        rows, share = values.shape
        gathered = paddle.empty([self.degree, rows, share], values.dtype)
        with self._collective():
            if self._on_gpu:
                self._group.all_gather_into_tensor_on_calc_stream(gathered, values)
            else:
                self._group.all_gather_into_tensor(gathered, values, True).wait()
        if rows == 1 and columns == self.degree * share:
            return gathered.reshape([1, columns])
        return ops.join_columns(gathered, columns)

    def share(self, value: Any) -> Any:
        return value if self.job is None else self.job.share(value)

    def smallest(self, value: int) -> int:
        return value if self.job is None else self.job.smallest(value)

    def add_up(self, done: int, total: int) -> tuple[int, int]:
        return (done, total) if self.job is None else self.job.add_up(done, total)

    def mark(self, values: paddle.Tensor, *, replayed: bool = False) -> None:
        if self._on_gpu:  # on a CPU the ops count their tiles
            ops.mark_progress(values, replayed=replayed)

    def fail(self, reason: str, status: int) -> int:
        return super().fail(reason, status) if self.job is None else self.job.fail(reason, status)

    def _keep(self) -> None:
        """In a forked child Paddle's objects are never destroyed: they would wait for threads of the rank."""
        for paddles in (self._store, self._group):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(paddles))

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Counts a collective for as long as the host is in it; one that fails names the rank whose fault it is."""
        if self.job is not None:
            self.job.check()
        self._library.qwen1m_enter_collective()
        try:
            yield
        except Exception as error:
            if self.job is not None:
                self.job.explain(error)
            raise
        finally:
            self._library.qwen1m_leave_collective()


_started: Group | None = None


def start(degree: int) -> Group:
    """The group of `degree` ranks that this process belongs to, made at the first call, with every other rank.

    From then on the death of a rank, and an exception that nothing catches, ends all of them: see Job. Raises
    ValueError when the launcher started another number of processes, job.StartError when they do not all come.
    """
    global _started
    ranks = launched_ranks()
    if degree == 1 and os.environ.get(GROUP_OF_ONE) != "1":
        return ALONE
    if degree != 1 and ranks == 1:
        raise ValueError(
            f"tensor_parallel_degree={degree} needs {degree} processes and this is one: start them with `{LAUNCH} "
            f"--devices 0,1,... SCRIPT` on GPUs, or `{LAUNCH} --nproc_per_node {degree} SCRIPT` on a CPU"
        )
    if degree not in (1, ranks):
        raise ValueError(
            f"tensor_parallel_degree must be the number of processes that were launched, {ranks}, got {degree}: start "
            "each replica of the model with a launcher of its own"
        )
    if _started is None:
        if ops.on_gpu():
            paddle.device.set_device(f"gpu:{paddle.distributed.ParallelEnv().device_id}")
        job = None
        if degree > 1:
            job = join(launched_rank(), os.environ["PADDLE_TRAINER_ENDPOINTS"].split(","))
            end_with_the_launcher()
        _started = ProcessGroup(job)
    return _started
