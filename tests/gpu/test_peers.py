"""Rows that ranks copy into each other's memory, the ranks being streams of one GPU: values, order, and their norm.

A process has fewer queues than it may have streams, and whoever waits at a queue's head holds up all behind it. Ranks
are processes, and send before they wait; so what is waited for here has been queued before, behind something that takes
long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from test_step_ops import DEVICE, check, each_half, exact, largest, poisoned, same_bits, stored  # noqa: E402

EPS = 1e-6


class Copying:
    """One rank: its stream, its copier, a flag for each of three others and rows that they fill."""

    def __init__(self, cuda: Any, rows: int, width: int) -> None:
        self.cuda, self.copier, self.stream = cuda, cuda.make_copier(), torch.cuda.Stream()
        self.flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        self.rows = poisoned(3, rows, width, dtype=torch.bfloat16)

    def take_long(self) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(50_000_000)

    def send(self, values: torch.Tensor, others: list[Copying], number: int) -> None:
        """All values to each, as its first rank's, behind what is on the stream."""
        sources, targets = ([values.data_ptr()] * len(others), [other.rows.data_ptr() for other in others])
        flags = [other.flags.data_ptr() for other in others]
        addresses = [np.array(column) for column in (sources, targets, flags)]
        size = values.numel() * values.element_size()
        fields = dict(zip(("from", "to", "flags"), addresses)) | {"copier": self.copier, "bytes": size}
        with torch.cuda.stream(self.stream):
            self.cuda("send_rows", **fields, count=len(others), number=number, mark=0)

    def wait(self, number: int, *, sent: bool = False) -> None:
        flags = np.array([self.flags.data_ptr()])
        with torch.cuda.stream(self.stream):
            self.cuda("await_rows", copier=self.copier if sent else 0, flags=flags, count=1, number=number, mark=0)


def test_rows_come_before_the_number_that_says_so(cuda: Any, rng: np.random.Generator) -> None:
    """Round after round, each of other values, which whoever has waited sees whole."""
    rows, width = 512, 1024
    sender, receivers = Copying(cuda, rows, width), [Copying(cuda, rows, width) for _ in range(3)]
    seen = [[poisoned(rows, width, dtype=torch.bfloat16) for _ in range(8)] for _ in receivers]
    drawn = [stored(rng.standard_normal((rows, width)), torch.bfloat16) for _ in range(8)]
    torch.cuda.synchronize()
    for number, values in enumerate(drawn, 250):
        sender.take_long()
        sender.send(values, receivers, number % 256)
        for receiver, copies in zip(receivers, seen):
            receiver.wait(number % 256)
            with torch.cuda.stream(receiver.stream):
                copies[number - 250].copy_(receiver.rows[0])
        torch.cuda.synchronize()
    for copies in seen:
        assert all(same_bits(copy, values) for copy, values in zip(copies, drawn))


def test_who_waits_comes_behind_what_is_sent(cuda: Any) -> None:
    sender, receiver = Copying(cuda, 64, 64), Copying(cuda, 64, 64)
    values = torch.ones(64, 64, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    sender.take_long()
    with torch.cuda.stream(sender.stream):
        values.fill_(2)
    sender.send(values, [receiver], 1)
    receiver.wait(1)
    assert not sender.stream.query() and not receiver.stream.query()
    receiver.stream.synchronize()
    assert (receiver.rows[0] == 2).all()


def test_what_has_been_sent_may_be_written_again_behind_a_wait_for_it(cuda: Any, rng: np.random.Generator) -> None:
    rows, width = 4096, 4096
    one, other = Copying(cuda, rows, width), Copying(cuda, rows, width)
    values, kept = (stored(rng.standard_normal((rows, width)), torch.bfloat16) for _ in range(2))
    kept.copy_(values)
    torch.cuda.synchronize()
    one.send(values, [other], 1)
    other.send(kept, [one], 1)
    one.wait(1, sent=True)
    with torch.cuda.stream(one.stream):
        values.zero_()
    torch.cuda.synchronize()
    assert same_bits(other.rows[0], kept)


@each_half
@pytest.mark.parametrize("degree, rows, width", [(2, 1000, 3584), (3, 7, 104), (4, 300, 5120), (8, 64, 8192)])
def test_the_norm_adds_the_ranks_parts_up_in_their_order(
    cuda: Any, rng: np.random.Generator, degree: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    weight, first, above = stored(rng.standard_normal(width), dtype), 5, 9
    deltas = [stored(rng.standard_normal((rows, width)), dtype) for _ in range(degree)]
    before = torch.tensor(rng.standard_normal((rows, width)), dtype=torch.float32, device=DEVICE)
    total = torch.zeros_like(before)
    for delta in deltas:
        total += delta.float()
    for rank in range(degree):
        parts = poisoned(degree - 1, first + rows + above, width, dtype=dtype)
        others = [delta for other, delta in enumerate(deltas) if other != rank]
        for part, delta in zip(parts, others):
            part[first : first + rows] = delta
        residual, out = before.clone(), poisoned(rows, width, dtype=dtype)
        norm = {"delta": deltas[rank], "residual": residual, "weight": weight, "out": out, "eps": EPS}
        norm |= {"tokens": rows, "width": width, "activation": dtype, "dtype": dtype}
        stride = (first + rows + above) * width
        cuda("parts_rms_norm", norm=norm, parts=parts[0][first:], stride=stride, rank=rank, degree=degree)
        torch.cuda.synchronize()
        assert same_bits(residual, before + total)
        normed = oracle.rms_norm(exact(residual), exact(weight), EPS)
        check(out, normed, 1e-6 * largest(normed))
