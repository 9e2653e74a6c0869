"""What one forward pass works on: its rows, where their keys go, and which keys each of them attends to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention import positions
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.cache import PagedCache
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
class SparsePiece:
    """A piece that attends to chosen keys only. `critical_rotary` float32 [V, n, D] rotates its n probe rows.

    groups: the first and the number of the row blocks that are computed between two pauses. pages: as of DensePieces.
    """

    piece: Piece
    block_table: paddle.Tensor
    scale: float
    critical_rotary: paddle.Tensor
    groups: Sequence[tuple[int, int]]
    pages: paddle.Tensor | None = None


@dataclass(frozen=True)
class DensePieces:
    """Pieces that are computed between two pauses: int32 [P, 4] in host memory. block_tables: int32 [S, W].

    pages: int32 [n], what a cache whose pages are copied for its readers is to copy; the tables then count in them.
    """

    pieces: paddle.Tensor
    block_tables: paddle.Tensor
    pages: paddle.Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One forward pass over T rows of S sequences. Either `lengths` is set and every row is a sequence's next token
    (decode), or the rows are prefilled: densely where `dense_pieces` say so, sparsely in `sparse_pieces`.

    ids, slots: int64 [T]. rotary: float32 [V, T, D]. block_tables: int32 [S, W]. scale: float32 [S], D^-0.5 m(n)^2.
    lengths: int32 [S].
    logit_rows: int64 [n], the rows of a prefill whose logits are wanted; decode gives those of every row.
    """

    ids: paddle.Tensor
    slots: paddle.Tensor
    rotary: paddle.Tensor
    block_tables: paddle.Tensor
    scale: paddle.Tensor
    logit_rows: paddle.Tensor | None = None
    lengths: paddle.Tensor | None = None
    dense_pieces: Sequence[DensePieces] = ()
    sparse_pieces: Sequence[SparsePiece] = ()


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


def _host(group: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(group, place=paddle.CPUPlace())


class StepBuilder:
    """Makes steps for one model: knows its rotary frequencies and attention scale.

    padded: how many rows a prefill of so many gets; those behind the sequences' are cached nowhere, attend to nothing
    and hold whatever was in memory.
    """

    def __init__(self, config: ModelConfig, padded: Callable[[int], int] = lambda rows: rows) -> None:
        self._padded = padded
        self._dual_chunk = config.dual_chunk
        self._head_dim = config.head_dim
        self._inv_freq = ops.tensor(positions.inv_freq(config))

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
        rotary_positions = positions.query_positions(where, self._dual_chunk, variants)
        slots = [*(cache.slots(rows.pages, rows.begin, rows.end) for rows in batch), spare - 1]
        pages = [list(rows.pages[: -(-rows.end // cache.page_size)]) for rows in batch]
        return Step(
            ids=ops.tensor(ids),
            slots=ops.tensor(np.concatenate(slots)),
            rotary=ops.rotary_table(ops.tensor(rotary_positions), self._inv_freq),
            block_tables=(tables := page_tables(pages)),
            scale=ops.tensor(np.asarray([self._scale(rows.length) for rows in batch], np.float32)),
            logit_rows=ops.tensor(np.asarray(logit_rows, np.int64)) if len(logit_rows) else None,
            dense_pieces=list(self._dense_pieces(dense, pages, tables, cache, row_blocks)),
            sparse_pieces=sparse,
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
        return Step(ids, slots, rotary, block_tables, scale, lengths=lengths)

    def _dense_pieces(
        self,
        pieces: Sequence[tuple[int, Piece]],
        pages: Sequence[Sequence[int]],
        tables: paddle.Tensor,
        cache: PagedCache,
        row_blocks: int,
    ) -> Iterator[DensePieces]:
        if cache.widened is None:
            yield from (DensePieces(_host(group), tables) for group in groups(pieces, row_blocks))
            return
        for together in copied_together(pieces, [len(held) for held in pages], cache.widened.num_pages):
            copied = [page for number in together for page in pages[number]]
            firsts = dict(zip(together, np.cumsum([0, *(len(pages[number]) for number in together)]).tolist()))
            own = [range(firsts[n], firsts[n] + len(held)) if n in firsts else [0] for n, held in enumerate(pages)]
            where = page_tables(own), ops.tensor(np.asarray(copied, np.int32))
            for group in groups([piece for piece in pieces if piece[0] in firsts], row_blocks):
                yield DensePieces(_host(group), *where)

    def _sparse_piece(self, piece: Piece, rows: SequenceRows, cache: PagedCache, row_blocks: int) -> SparsePiece:
        pages, table = np.asarray(rows.pages[: -(-piece.end // cache.page_size)], np.int32), None
        if cache.widened is not None:
            table = np.arange(len(pages), dtype=np.int32)
        probe = np.arange(piece.end - piece.probe_rows, piece.end)
        variants = positions.num_variants(piece.end, self._dual_chunk.chunk_len)
        critical = positions.critical_positions(probe, self._dual_chunk, variants)
        return SparsePiece(
            piece=piece,
            block_table=ops.tensor(pages if table is None else table),
            pages=None if table is None else ops.tensor(pages),
            scale=self._scale(rows.length),
            critical_rotary=ops.rotary_table(ops.tensor(critical), self._inv_freq),
            groups=[
                (first, min(row_blocks, piece.row_blocks - first)) for first in range(0, piece.row_blocks, row_blocks)
            ],
        )

    def _scale(self, length: int) -> float:
        return float(self._head_dim**-0.5 * self._dual_chunk.temperature(length) ** 2)
