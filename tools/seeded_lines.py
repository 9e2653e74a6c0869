"""Columns and diagonals that a sparse prefill of random weights visits in place of those that it chooses.

Random weights have no structure, and the diagonals that they would choose scatter. So probe and top-k run for real, and
what goes on is lines of sparse_workload.py, seeded for each layer, head and piece of a chunk and as many as the budgets
say, as a real selection has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import paddle
import sparse_workload
from cuda_driver import Carrier

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.selector import Lines, Selector
from paddle_qwen1m.attention.step import SparsePiece


class Ahead(NamedTuple):
    """What is on its way to the device for the next piece of a layer."""

    piece: Piece
    lines: list[paddle.Tensor]
    sent: Any


class SeededLines:
    """Columns and diagonals of every layer for every piece of a prompt: made when a layer first asks, kept in pinned
    memory, since making them takes the host longer than a layer takes the GPU. Once prepared, those of a layer's next
    piece are copied to the device while the computation goes on, and those of its last one are there: a real prefill
    has no such copies.
    """

    def __init__(self, rank: int, carrier: Carrier | None) -> None:
        self._rank, self._carrier = rank, carrier
        self._budgets: dict[int, list[tuple[int, int]]] = {}
        self._pinned: dict[tuple[int, int, int], list[paddle.Tensor]] = {}
        self._following: dict[tuple[int, int], Piece] = {}
        self._ahead: dict[int, Ahead] = {}
        self._last: dict[int, tuple[Piece, list[paddle.Tensor]]] = {}
        """What each layer got last; the next piece but one's go there."""

    def of(self, selector: Selector, piece: Piece) -> list[paddle.Tensor]:
        """What select_critical would return for the layer's heads and the piece; nothing waits for the GPU."""
        layer = selector.layer
        if layer not in self._budgets:
            sizes = selector.budgets.vertical.numpy().tolist(), selector.budgets.slash.numpy().tolist()
            self._budgets[layer] = list(zip(*sizes))
        ahead = self._ahead.pop(layer, None)
        if ahead is not None and self._carrier is not None:
            self._carrier.receive(ahead.sent)
        last, targets = self._last.pop(layer, (None, None))
        if ahead is not None and same_rows(ahead.piece, piece):
            lines = ahead.lines
        elif last is not None and targets is not None and same_rows(last, piece):
            lines, targets = targets, None
        else:
            lines = self._copied(layer, piece)
        following = self._following.get((piece.begin, piece.end))
        if following is not None and self._carrier is not None:
            kept = self._kept(layer, following)
            if targets is None or [one.shape for one in targets] != [one.shape for one in kept]:
                targets = [paddle.empty(one.shape, one.dtype) for one in kept]
            self._ahead[layer] = Ahead(following, targets, self._carrier.send(kept, targets))
        self._last[layer] = piece, lines
        return lines

    def prepare(self, many: Iterable[Piece]) -> None:
        """Makes those of a prompt's pieces, of every layer that has asked before."""
        chosen = [piece for piece in many if piece.worth_choosing]
        self._following |= {(one.begin, one.end): other for one, other in zip(chosen, chosen[1:])}
        for piece in chosen:
            for layer in self._budgets:
                self._kept(layer, piece)

    def _copied(self, layer: int, piece: Piece) -> list[paddle.Tensor]:
        place = paddle.framework._current_expected_place()
        return [lines._copy_to(place, False) for lines in self._kept(layer, piece)]

    def _kept(self, layer: int, piece: Piece) -> list[paddle.Tensor]:
        name = layer, piece.begin, piece.end
        if name not in self._pinned:
            workload = sparse_workload.Workload(piece.rows, piece.end, "a layer's", 64)
            lines = sparse_workload.make(workload, self._budgets[layer], (layer, self._rank, piece.end))
            place = paddle.CUDAPinnedPlace() if ops.on_gpu() else paddle.CPUPlace()
            self._pinned[name] = [
                paddle.to_tensor(values, place=place) for values in (lines.columns, lines.slashes(piece.end))
            ]
        return self._pinned[name]


def same_rows(one: Piece, other: Piece) -> bool:
    return (one.begin, one.end) == (other.begin, other.end)


@contextmanager
def seeded_selection(rank: int = 0) -> Iterator[SeededLines]:
    """Selectors probe and rank their keys, and go on with seeded lines instead of those that they found."""
    choose, select = Selector.choose, ops.select_critical
    lines, asking = SeededLines(rank, Carrier() if ops.on_gpu() else None), list[tuple[Selector, Piece]]()

    def choose_seeded(selector: Selector, sparse: SparsePiece, *arguments: Any) -> Lines:
        asking[:] = [(selector, sparse.piece)]
        return choose(selector, sparse, *arguments)

    def select_seeded(*arguments: Any) -> list[paddle.Tensor]:
        select(*arguments)
        return lines.of(*asking[0])

    Selector.choose = choose_seeded  # type: ignore[method-assign]
    ops.select_critical = select_seeded  # type: ignore[assignment]
    try:
        yield lines
    finally:
        Selector.choose, ops.select_critical = choose, select  # type: ignore[method-assign, assignment]
