"""What one forward pass works on: its rows, where their keys go, and which keys each of them attends to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Callable, NamedTuple

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention import positions
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.cache import CopiedPages, PagedCache
from paddle_qwen1m.config import BLOCK, ModelConfig


@dataclass(frozen=True)
class SequenceRows:
    """New tokens of one sequence: `ids` stand at positions [begin, begin + len(ids)); `pages` hold them and all before.

    `length` is the n of the temperature m(n): the whole prompt's length in prefill, the current length in decode.
    `sparse` rows attend to chosen keys, piece by piece, where that is worth choosing.
    """

    ids: np.ndarray
    begin: int
    pages: Sequence[int]
    length: int
    sparse: bool = False

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int64 and self.ids.ndim == 1 and len(self.ids) > 0
        assert self.begin >= 0 and self.length >= self.end

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)


@dataclass(frozen=True)
class RowShare:
    """Number `number` of `count` shares of a step's rows, those that a rank attends for; others have the same keys."""

    number: int = 0
    count: int = 1

    def of_blocks(self, first: int, blocks: int) -> tuple[int, int]:
        """The first and the number of its row blocks among [first, first + blocks), which may be none."""
        begin, end = (first + blocks * number // self.count for number in (self.number, self.number + 1))
        return begin, end - begin

    def of_pieces(self, group: np.ndarray) -> np.ndarray:
        """Its rows of pieces int32 [P, 4]: of each piece, cut in twice as many runs as there are shares, one run from
        either end, for rows near the end see more keys.
        """
        if self.count == 1:
            return group
        own = []
        for number, row, rows, begin in group.tolist():
            blocks = -(-rows // BLOCK)
            for run in (self.number, 2 * self.count - 1 - self.number):
                first, count = RowShare(run, 2 * self.count).of_blocks(0, blocks)
                if count:
                    skipped = first * BLOCK
                    own.append((number, row + skipped, min(count * BLOCK, rows - skipped), begin + skipped))
        return np.asarray(own, np.int32).reshape([-1, 4])


ALL_ROWS = RowShare()


class Run(NamedTuple):
    """Rows, or row blocks, [first, first + size), which may be none. pauses: behind them attention does."""

    first: int
    size: int
    pauses: bool


@dataclass(frozen=True)
class SparsePiece:
    """A piece that attends to chosen keys only. `critical_rotary` float32 [V, n, D] rotates its n probe rows.

    groups: the first and the number of the row blocks that are computed between two pauses, of which `share` has some.
    block_table: int32 [W]. copied: as of DensePieces, with a table int32 [W].
    """

    piece: Piece
    block_table: paddle.Tensor
    scale: float
    critical_rotary: paddle.Tensor
    groups: Sequence[tuple[int, int]]
    copied: CopiedPages | None = None
    share: RowShare = ALL_ROWS

    @property
    def own_groups(self) -> list[tuple[int, int]]:
        """What the share has of each group."""
        return [self.share.of_blocks(*group) for group in self.groups]

    def spans(self, rows_at_once: int) -> Iterator[tuple[Piece, int, list[Run]]]:
        """What the share has of it in parts of rows_at_once: each as a piece, the number of its first row block, and
        what of it is computed at a time, in its own row blocks.
        """
        blocks = rows_at_once // BLOCK
        runs = [run for group in self.own_groups for run in cut_at(blocks, *group)]
        last = self.piece.row_blocks - 1  # what is empty may stand behind it
        for number, own in groupby(runs, key=lambda run: min(run.first, last) // blocks):
            first = number * blocks
            yield self.piece.blocks(first, blocks), first, [run._replace(first=run.first - first) for run in own]

    def around(self, rows: np.ndarray) -> SparsePiece | None:
        """Of its row blocks those that Piece.around names; keys are chosen as for all of them."""
        part = self.piece.around(rows)
        if part is None:
            return None
        begin = (part.row - self.piece.row) // BLOCK
        end = begin + part.row_blocks
        parts = ((max(first, begin), min(first + count, end)) for first, count in self.groups)
        return replace(self, groups=[(first, last - first) for first, last in parts if first < last])


@dataclass(frozen=True)
class DensePieces:
    """Pieces that are computed together: int32 [P, 4] in host memory, or in that of the device where a graph captures
    them; P may be 0, and a piece's rows. Their rows count from row `first` of the step on, a multiple of rows_at_once,
    and are no more than that. pauses: behind them attention does. copied: what layers whose pages are copied for their
    readers are to copy, with tables int32 [S, W].
    """

    pieces: paddle.Tensor
    first: int = 0
    pauses: bool = True
    copied: CopiedPages | None = None


@dataclass(frozen=True)
class Step:
    """One forward pass over T rows of S sequences. Either `lengths` is set and every row is a sequence's next token
    (decode), or the rows are prefilled: densely where `dense_pieces` say so, sparsely in `sparse_pieces`; in the last
    layer, from which nothing but logits follows, only where `last_dense_pieces` and `last_sparse_pieces` do.

    rows_at_once: how many rows of a prefill attention works on at once, a multiple of BLOCK.
    ids, slots: int64 [T]. rotary: float32 [V, T, D]. block_tables: int32 [S, W]. scale: float32 [S], D^-0.5 m(n)^2.
    lengths: int32 [S].
    logit_rows: int64 [m], the rows that a prefill's last layer computes: the `num_logits` whose logits are wanted, then
    copies, since products of as few rows as decode has are rounded otherwise than those of the layers before. Decode
    gives the logits of every row.
    attended: int64 [T], the number of each row that this rank attends for, -1 of another's; None: all are its. The last
    layer's, of `logit_rows`: `last_attended`.
    """

    ids: paddle.Tensor
    slots: paddle.Tensor
    rotary: paddle.Tensor
    block_tables: paddle.Tensor
    scale: paddle.Tensor
    rows_at_once: int
    logit_rows: paddle.Tensor | None = None
    num_logits: int = 0
    lengths: paddle.Tensor | None = None
    dense_pieces: Sequence[DensePieces] = ()
    sparse_pieces: Sequence[SparsePiece] = ()
    last_dense_pieces: Sequence[DensePieces] = ()
    last_sparse_pieces: Sequence[SparsePiece] = ()
    attended: paddle.Tensor | None = None
    last_attended: paddle.Tensor | None = None

    def of_last_layer(self) -> Step:
        """The same, attending in the row blocks of `logit_rows` alone."""
        return replace(
            self,
            dense_pieces=self.last_dense_pieces,
            sparse_pieces=self.last_sparse_pieces,
            attended=self.last_attended,
        )


def page_tables(pages: Sequence[Sequence[int]]) -> paddle.Tensor:
    """Each sequence's pages in a row, int32 [S, W]; shorter rows end in zeros."""
    tables = np.zeros((len(pages), max(map(len, pages))), np.int32)
    for table, row in zip(tables, pages):
        table[: len(row)] = row
    return ops.tensor(tables)


def copied_together(pieces: Sequence[tuple[int, Piece]], pages: Sequence[int], most: int) -> Iterator[list[int]]:
    """The numbers of neighbouring sequences, of which each has so many `pages`, together at most `most`."""
    together: list[int] = []
    for number, _ in pieces:
        if number in together:
            continue
        if together and sum(pages[one] for one in together) + pages[number] > most:
            yield together
            together = []
        together.append(number)
    if together:
        yield together


def groups(pieces: Iterable[tuple[int, Piece]], row_blocks: int) -> list[np.ndarray]:
    """Pieces of numbered sequences as int32 [P, 4], in groups of `row_blocks` row blocks (0: in one), cut to fit."""
    made: list[list[tuple[int, int, int, int]]] = []
    room = 0
    for number, piece in pieces:
        rest: Piece | None = piece
        while rest is not None:
            if room == 0:
                made.append([])
                room = row_blocks or sys.maxsize
            part, rest = rest.split(room * BLOCK)
            made[-1].append((number, part.row, part.rows, part.begin))
            room -= part.row_blocks
    return [np.asarray(group, np.int32) for group in made]


def cut_at(many: int, first: int, count: int) -> Iterator[Run]:
    """[first, first + count), cut at multiples of `many`; there is a pause behind the last part."""
    end = first + count
    while end - first > many - first % many:
        yield Run(first, many - first % many, pauses=False)
        first += many - first % many
    yield Run(first, end - first, pauses=True)


def dense_pieces(group: np.ndarray, rows_at_once: int, copied: CopiedPages | None) -> Iterator[DensePieces]:
    """Pieces int32 [P, 4] of a step's rows, cut where DensePieces do, with a pause behind all of them."""
    parts: list[tuple[int, list[tuple[int, int, int, int]]]] = []
    for number, row, rows, begin in group.tolist():
        for run in cut_at(rows_at_once, row, rows):
            first = run.first // rows_at_once * rows_at_once
            if not parts or parts[-1][0] != first:
                parts.append((first, []))
            parts[-1][1].append((number, run.first - first, run.size, begin + run.first - row))
    for index, (first, own) in enumerate(parts or [(0, [])]):
        pieces = paddle.to_tensor(np.asarray(own, np.int32).reshape([-1, 4]), place=paddle.CPUPlace())
        yield DensePieces(pieces, first, index + 1 >= len(parts), copied)


def attended_rows(rows: int, dense: Iterable[DensePieces], sparse: Iterable[SparsePiece]) -> np.ndarray:
    """The number of each of so many rows that the share of these pieces has, int64 [T]; -1 of others."""
    attended = np.full(rows, -1, np.int64)
    pieces = ((one.first, piece) for one in dense for piece in one.pieces.numpy().tolist())
    runs = [(first + row, first + row + count) for first, (_, row, count, _) in pieces]
    for whole in sparse:
        piece = whole.piece
        for first, count in whole.own_groups:
            runs.append((piece.row + first * BLOCK, piece.row + min((first + count) * BLOCK, piece.rows)))
    for begin, end in runs:
        attended[begin:end] = np.arange(begin, end)
    return attended


class StepBuilder:
    """Makes steps for one model, or a rank's share of one: knows its rotary frequencies and attention scale.

    padded: how many rows a prefill of so many gets; those behind the sequences' are cached nowhere, attend to nothing
    and hold whatever was in memory. share: which rows are attended for; of a decode step every count-th one.
    """

    def __init__(
        self, config: ModelConfig, padded: Callable[[int], int] = lambda rows: rows, share: RowShare = ALL_ROWS
    ) -> None:
        self._padded, self._share = padded, share
        self._attended: dict[int, paddle.Tensor] = {}
        self._dual_chunk = config.dual_chunk
        self._head_dim, self.rows_at_once = config.head_dim, config.rows_at_once
        self._inv_freq = ops.tensor(positions.inv_freq(config))

    @property
    def chunk_len(self) -> int:
        """L, tokens of a DCA chunk."""
        return self._dual_chunk.chunk_len

    def query_positions(self, where: np.ndarray, variants: int) -> np.ndarray:
        """Rotary positions int32 [variants, T] of queries at positions [T]."""
        return positions.query_positions(where, self._dual_chunk, variants)

    def rotary_table(self, rotary_positions: paddle.Tensor) -> paddle.Tensor:
        """Of positions int32 [V, T]: float32 [V, T, D]."""
        return ops.rotary_table(rotary_positions, self._inv_freq)

    def scale(self, length: int) -> float:
        """D^-0.5 m(length)^2."""
        return float(self._head_dim**-0.5 * self._dual_chunk.temperature(length) ** 2)

    def prefill(
        self, batch: Sequence[SequenceRows], cache: PagedCache, logit_rows: Sequence[int], row_blocks: int = 0
    ) -> Step:
        """Rows of several sequences, one sequence after the other; `logit_rows` count over all of them.

        Attention pauses behind every `row_blocks` row blocks, 0: behind all dense pieces and behind each sparse one.
        """
        dense: list[tuple[int, Piece]] = []
        sparse: list[SparsePiece] = []
        row = 0
        for number, rows in enumerate(batch):
            for piece in positions.pieces(rows.begin, rows.end, self._dual_chunk.chunk_len, row):
                if rows.sparse and piece.worth_choosing:
                    sparse.append(self._sparse_piece(piece, rows, cache, row_blocks or piece.row_blocks))
                else:
                    dense.append((number, piece))
            row += len(rows.ids)
        spare = np.zeros(self._padded(row) - row, np.int64)
        ids = np.concatenate([*(rows.ids for rows in batch), spare])
        where = np.concatenate([*(np.arange(rows.begin, rows.end) for rows in batch), spare])
        variants = positions.num_variants(int(where.max()) + 1, self._dual_chunk.chunk_len)
        rotary_positions = self.query_positions(where, variants)
        slots = [*(cache.slots(rows.pages, rows.begin, rows.end) for rows in batch), spare - 1]
        pages = [list(rows.pages[: -(-rows.end // cache.page_size)]) for rows in batch]
        wanted = np.asarray(logit_rows, np.int64)
        computed = max(len(wanted), min(len(where), ops.FEW_ROWS + 1))
        last_dense = [(number, part) for number, piece in dense if (part := piece.around(wanted)) is not None]
        dense_pieces = list(self._dense_pieces(dense, pages, cache, row_blocks))
        last_dense_pieces = list(self._dense_pieces(last_dense, pages, cache, row_blocks))
        last_sparse = [own for whole in sparse if (own := whole.around(wanted)) is not None]
        attended = last_attended = None
        if self._share.count > 1:
            attended = ops.tensor(attended_rows(len(where), dense_pieces, sparse))
            last = attended_rows(len(where), last_dense_pieces, last_sparse)
            last_attended = ops.tensor(last[np.resize(wanted, computed)]) if len(wanted) else None
        return Step(
            ids=ops.tensor(ids),
            slots=ops.tensor(np.concatenate(slots)),
            rotary=self.rotary_table(ops.tensor(rotary_positions)),
            block_tables=page_tables(pages),
            scale=ops.tensor(np.asarray([self.scale(rows.length) for rows in batch], np.float32)),
            rows_at_once=self.rows_at_once,
            logit_rows=ops.tensor(np.resize(wanted, computed)) if len(wanted) else None,
            num_logits=len(wanted),
            dense_pieces=dense_pieces,
            sparse_pieces=sparse,
            last_dense_pieces=last_dense_pieces,
            last_sparse_pieces=last_sparse,
            attended=attended,
            last_attended=last_attended,
        )

    def decode(self, ids: paddle.Tensor, lengths: paddle.Tensor, block_tables: paddle.Tensor, page_size: int) -> Step:
        """The next token of each sequence: `ids` int64 [S] go behind `lengths` int32 [S] tokens, which grow in place.

        Nothing is read back and nothing depends on the lengths, so that the step can be captured and replayed.
        """
        dual_chunk = self._dual_chunk
        slots, rotary, scale = ops.decode_inputs(
            lengths,
            block_tables,
            self._inv_freq,
            page_size,
            dual_chunk.chunk_len,
            dual_chunk.chunk_size,
            dual_chunk.original_max_position_embeddings,
        )
        attended = self._decoded(ids.shape[0])
        return Step(ids, slots, rotary, block_tables, scale, self.rows_at_once, lengths=lengths, attended=attended)

    def _decoded(self, count: int) -> paddle.Tensor | None:
        """`attended` of so many decoded rows; made once, since a captured step takes nothing from the host."""
        if self._share.count == 1:
            return None
        if count not in self._attended:
            rows = np.arange(count, dtype=np.int64)
            self._attended[count] = ops.tensor(np.where(rows % self._share.count == self._share.number, rows, -1))
        return self._attended[count]

    def _dense_pieces(
        self,
        pieces: Sequence[tuple[int, Piece]],
        pages: Sequence[Sequence[int]],
        cache: PagedCache,
        row_blocks: int,
    ) -> Iterator[DensePieces]:
        if cache.widened is None:
            for group in groups(pieces, row_blocks):
                yield from dense_pieces(self._share.of_pieces(group), self.rows_at_once, None)
            return
        for together in copied_together(pieces, [len(held) for held in pages], cache.widened.num_pages):
            copied = [page for number in together for page in pages[number]]
            firsts = dict(zip(together, np.cumsum([0, *(len(pages[number]) for number in together)]).tolist()))
            own = [range(firsts[n], firsts[n] + len(held)) if n in firsts else [0] for n, held in enumerate(pages)]
            where = CopiedPages(ops.tensor(np.asarray(copied, np.int32)), page_tables(own))
            for group in groups([piece for piece in pieces if piece[0] in firsts], row_blocks):
                yield from dense_pieces(self._share.of_pieces(group), self.rows_at_once, where)

    def _sparse_piece(self, piece: Piece, rows: SequenceRows, cache: PagedCache, row_blocks: int) -> SparsePiece:
        table = ops.tensor(np.asarray(rows.pages[: -(-piece.end // cache.page_size)], np.int32))
        in_order = None if cache.widened is None else ops.tensor(np.arange(len(table), dtype=np.int32))
        probe = np.arange(piece.end - piece.probe_rows, piece.end)
        variants = positions.num_variants(piece.end, self._dual_chunk.chunk_len)
        critical = positions.critical_positions(probe, self._dual_chunk, variants)
        return SparsePiece(
            piece=piece,
            block_table=table,
            copied=None if in_order is None else CopiedPages(table, in_order),
            scale=self.scale(rows.length),
            critical_rotary=self.rotary_table(ops.tensor(critical)),
            groups=[
                (first, min(row_blocks, piece.row_blocks - first)) for first in range(0, piece.row_blocks, row_blocks)
            ],
            share=self._share,
        )
