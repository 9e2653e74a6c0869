"""How the rows of a step go through the layers: in parts of a large chunk, and on several ranks so that what is summed
over all of them waits for nobody.

Few rows, of a decode step above all, are one lane: behind each product their sum over all ranks, and its norm. Many
rows are two to eight lanes. A rank keeps the residual stream of one share of a lane's rows: a product's sums come to it
by a reduce-scatter, it norms its share, and an all-gather gives all ranks the lane's rows. While those of one lane are
under way, copied by the cards or on the library's stream, the computation goes on with the next ones'. Lanes are of the
rows alone: attention has all of them, its keys are cached before any are chosen, and nothing is under way at its
beginning, nor where a prefill stands still.

One rank alone has lanes, too, so that no more of the MLP is in memory at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Callable, Union

import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.config import LANE_ROWS
from paddle_qwen1m.parallel.copies import Copies
from paddle_qwen1m.parallel.group import Group
from paddle_qwen1m.parallel.mailboxes import Mailboxes
from paddle_qwen1m.parallel.pending import Pending
from paddle_qwen1m.parallel.room import lane_borders

Activations = Union[paddle.Tensor, ops.Rows8, "list[ops.Rows8]"]
"""Of T rows: [T, N] in the activations' type, or in FP8, in parts one below the other where there are several."""
Product = Callable[[Any], Any]
"""Of rows [n, K] as many new ones, the last of several products a tensor, or one that was sent."""
TakesRows8 = Callable[[int], bool]
"""Whether so many rows behind a norm are wanted in FP8."""


class Lane:
    """Rows [first, last) of a step. residual: of this rank's share of them, float32 [share, N]."""

    def __init__(self, number: int, first: int, last: int) -> None:
        self.number, self.first, self.last = number, first, last
        self.residual: paddle.Tensor | None = None
        self.sums: Pending | None = None
        self.normed: Pending | None = None

    def of(self, values: paddle.Tensor) -> paddle.Tensor:
        """Its rows of all of them [T, ...], a view."""
        return values if self.last - self.first == values.shape[0] else values[self.first : self.last]


class Lanes:
    """The lanes of a step of `rows` rows of `width` activations, and what is under way of them. eps: of the norms.
    split: whether they may be several; a decode step's, which a graph captures, are one. at_once: rows of one rank's.

    `add` takes the products of the layers one after the other; `all_rows` gives what is behind the last norm, which
    stays as it is until the next `add`. Behind a `with` nothing of theirs is used any more.
    """

    def __init__(
        self, group: Group, rows: int, width: int, eps: float, *, split: bool = True, at_once: int = LANE_ROWS
    ) -> None:
        self._group, self._rows, self._width, self._eps = group, rows, width, eps
        if not split:
            borders = [0, rows]
        elif group.adds_up:
            count, grain = group.lanes(rows), group.degree
            borders = [*(rows * number // (grain * count) * grain for number in range(count)), rows]
        else:
            borders = lane_borders(rows, at_once)
        self._lanes = [Lane(number, *ends) for number, ends in enumerate(zip(borders, borders[1:]))]
        count = len(self._lanes)
        self._is_split = count > 1 and group.adds_up
        """Between ranks: each norms a share of a lane's rows, which are gathered."""
        self._copies: Copies | None = group.lend_copies(rows, width) if self._is_split else None
        self.mailboxes: Mailboxes | None = group.mailboxes(rows, width) if count == 1 else None
        """By which the last product of an `add` may send what it makes."""
        self._late: deque[tuple[Lane, paddle.Tensor, TakesRows8 | None]] = deque()
        """Lanes whose sums are to be normed, and how."""
        self._gathered: paddle.Tensor | None = None if self._copies is None else self._copies.rows(0, rows)

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._copies is not None:
            self._copies.give_back()

    @property
    def count(self) -> int:
        """How often a product is computed."""
        return len(self._lanes)

    def add(
        self,
        rows: paddle.Tensor | None,
        products: Sequence[Product],
        norm: paddle.Tensor,
        takes_rows8: TakesRows8 | None = None,
    ) -> None:
        """Puts each lane's part of `rows` [T, K], None: what is behind the last norm, through the products, one behind
        the other, adds what comes out over the ranks and to the residual stream, and norms that by `norm` [N]: in FP8
        where that is wanted, and the rows need not be gathered.

        What a lane before has added is normed behind a product, which its sums' way is beside. A product alone may be
        shorter than that way: between ranks some lanes are left to later ones.
        """
        spare = max(0, self.count // 2 - 1) if self._is_split and len(products) == 1 else 0
        for lane in self._lanes:
            values = self._normed(lane) if rows is None else lane.of(rows)
            for product in products:
                values = product(values)
                if len(self._late) > spare:
                    self._norm_next()
            lane.sums = self._on_its_way(lane, values)
            del values
            self._late.append((lane, norm, takes_rows8))

    def all_rows(self) -> Activations:
        """All rows behind the last norm, activations [T, N]. No collective is under way then."""
        found = [self._normed(lane) for lane in self._lanes]
        whole = self._gathered
        if whole is None:
            whole = found if len(found) > 1 else found[0]
        if self._copies is None:
            self._gathered = None
        for lane in self._lanes:
            lane.normed = None
        return whole

    def of_rows(self, rows: paddle.Tensor) -> Lanes:
        """Of some rows of the step, int64 [n], in one lane, where the layers go on with those alone."""
        others = Lanes(self._group, rows.shape[0], self._width, self._eps, split=False)
        others._lanes[0].residual = ops.gather_rows(self._residual(), rows)
        return others

    def _residual(self) -> paddle.Tensor:
        """The residual stream of all rows, float32 [T, N], on every rank."""
        assert not self._late
        shares: list[paddle.Tensor] = [lane.residual for lane in self._lanes]
        if len(shares) == 1 and not self._is_split:
            return shares[0]
        whole = paddle.empty([self._rows, shares[0].shape[1]], shares[0].dtype)
        for pending in [self._group.all_gather(own, lane.of(whole)) for own, lane in zip(shares, self._lanes)]:
            pending.wait()
        return whole

    def _normed(self, lane: Lane) -> Activations:
        """A lane's rows behind the last norm, activations [n, N]."""
        while lane.sums is not None:
            self._norm_next()
        assert lane.normed is not None, "nothing has been added since all rows were given"
        return lane.normed.wait()

    def _on_its_way(self, lane: Lane, values: paddle.Tensor) -> Pending:
        """The sums over all ranks of a lane's `values` [n, N], of this rank's share where lanes are several."""
        if not self._is_split:
            return Pending(values)
        if self._copies is None or lane.residual is None:
            return self._group.reduce_scatter(values)
        return self._copies.scatter(values, lane.number, lane.first)

    def _norm_next(self) -> None:
        """Norms the sums that have been under way for longest, a rank its share of them, and sends that to all."""
        lane, weight, takes_rows8 = self._late.popleft()
        assert lane.sums is not None
        values, lane.sums = lane.sums.wait(), None
        lane.normed = None
        if self._copies is not None and lane.residual is not None:
            lane.normed = self._copies.add_rms_norm(values, lane.number, lane.first, lane.residual, weight, self._eps)
            return
        own: Any
        in_fp8 = takes_rows8 is not None and not self._is_split and takes_rows8(lane.last - lane.first)
        if not self._is_split and (in_fp8 or lane.residual is None):
            values = self._group.all_reduce(values)
        # Where lanes are local, rows are normed into the place of those of the norm before, which have been used.
        into: paddle.Tensor | None = None
        if self.count > 1 and not (self._is_split or in_fp8):
            into = lane.of(self._room_for_all(weight.dtype if weight.place.is_gpu_place() else paddle.float32))
        if lane.residual is None:
            lane.residual = values
            own = ops.rms_norm8(values, weight, self._eps) if in_fp8 else ops.rms_norm(values, weight, self._eps, into)
        elif in_fp8:
            own = ops.add_rms_norm8(values, lane.residual, weight, self._eps)
        elif self._is_split or into is not None:
            own = ops.add_rms_norm(values, lane.residual, weight, self._eps, into)
        else:
            own = self._group.add_rms_norm(values, lane.residual, weight, self._eps)
        if not self._is_split:
            lane.normed = Pending(own)
            return
        if self._copies is None and lane is self._lanes[0]:
            self._gathered = None
        lane.normed = self._group.all_gather(own, lane.of(self._room_for_all(own.dtype)))

    def _room_for_all(self, dtype: paddle.dtype) -> paddle.Tensor:
        """Where all rows behind a norm come together, activations [T, N]."""
        if self._gathered is None:
            self._gathered = paddle.empty([self._rows, self._width], dtype)
        return self._gathered
