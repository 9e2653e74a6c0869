"""Texts before a layer: what pairs keep of its heads' attention to them, and what the layer makes of the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import numpy.typing as npt
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.positions import Piece
from paddle_qwen1m.attention.positions import pieces as cut
from paddle_qwen1m.attention.selector import LayerBudgets, Projected
from paddle_qwen1m.attention.step import SequenceRows, SparsePiece, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.calibrate.strategies import Kept, Pairs
from paddle_qwen1m.config import BLOCK, ModelConfig
from paddle_qwen1m.model import DecoderLayer

MEASURED_FROM = 0.5
"""Of a text: what is behind it has the most keys to choose from, and three quarters of the work."""
BLOCKS_A_TEXT = 128
"""Row blocks that are measured, as many in each piece, spread evenly, the piece's last one among them."""
LAST_ROWS = 64
"""Of a text, which count on their own."""
BLOCKS_ABREAST = 256
"""Row blocks, of a head each, that a GPU computes in the time of one, at least."""


@dataclass
class Text:
    """Token ids int64 [T] and, float32 [T, hidden], their residual stream before the layer at hand."""

    ids: npt.NDArray[np.int64]
    residual: npt.NDArray[np.float32]


class _Known(NamedTuple):
    """What of a piece does not depend on pairs. sums: what its probe found. lse float64 [n, H] and out float32
    [n, H, D]: of the full attention of the rows that are measured. sizes [n]: squared norms of the residual stream
    behind it.
    """

    sums: tuple[paddle.Tensor, paddle.Tensor]
    lse: npt.NDArray[np.float64]
    out: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Piece:
    """A sparse piece of a text before a layer. q: of the chunk that it is in. The rows of `blocks` are measured: `rows`
    of q, which stand at `positions`.
    """

    sparse: SparsePiece
    q: paddle.Tensor
    known: _Known
    blocks: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class Layer:
    """One layer and the texts before it, which are read in chunks of `chunk` tokens, as prompts are.

    cache: of one layer, with room for the longest text; keys and values of the text at hand. on_measured: called behind
    each pair that was measured on a text.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        config: ModelConfig,
        texts: Sequence[Text],
        cache: PagedCache,
        chunk: int,
        on_measured: Callable[[], object] = lambda: None,
    ) -> None:
        self._layer, self._config, self._texts, self._cache, self._chunk = layer, config, texts, cache, chunk
        self._builder, self._on_measured = StepBuilder(config), on_measured
        self._at_hand: tuple[int, list[_Piece]] | None = None
        self._known: dict[tuple[int, int], _Known] = {}
        """By the text's number and where the piece begins."""
        output = _floats(layer.output_weight)
        of_heads = output.reshape(len(output), config.num_heads, -1).transpose(1, 0, 2)
        self._output_gram = of_heads.transpose(0, 2, 1) @ of_heads
        """Float32 [H, D, D]: x' gram x is the squared norm of what a head's x adds to the residual stream."""

    def measure(self, *pairs: Pairs, first_alone: bool = False, change: bool = False) -> list[Kept]:
        """What each of the pairs keeps of the attention to all texts, or to the first one."""
        texts = range(1 if first_alone else len(self._texts))
        of_texts = [[self._measure(number, one, change) for one in pairs] for number in texts]
        return [Kept(*(np.mean(values, axis=0) for values in zip(*of_pair))) for of_pair in zip(*of_texts)]

    def advance(self) -> Iterator[int]:
        """Takes the texts through the layer, with full attention; yields tokens as they are done."""
        self._at_hand = None
        layer, eps = self._layer, self._config.rms_norm_eps
        for text in self._texts:
            for begin, step in self._steps(text, sparse=False):
                rows = slice(begin, begin + self._chunk)
                residual = ops.tensor(text.residual[rows])
                normed = ops.rms_norm(residual, layer.input_norm, eps)
                normed = ops.add_rms_norm(self._attention(normed, step), residual, layer.post_attention_norm, eps)
                inner = layer.gated_product(1)(normed)
                ops.add_rms_norm(layer.linear(inner, "down_weight"), residual, layer.post_attention_norm, eps)
                text.residual[rows] = residual.numpy()
                yield len(text.residual[rows])

    def _attention(self, normed: paddle.Tensor, step: Step) -> paddle.Tensor:
        running = self._layer.attention(normed, step, self._cache.layers[0], None)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return self._layer.linear(end.value, "output_weight")

    def _steps(self, text: Text, *, sparse: bool) -> Iterator[tuple[int, Step]]:
        length = len(text.ids)
        pages = range(-(-length // self._cache.page_size))
        for begin in range(0, length, self._chunk):
            ids = text.ids[begin : begin + self._chunk]
            yield begin, self._builder.prefill([SequenceRows(ids, begin, pages, length, sparse)], self._cache, ())

    def _pieces(self, number: int) -> list[_Piece]:
        """Of a text, whose keys are in the cache afterwards."""
        if self._at_hand is None or self._at_hand[0] != number:
            self._at_hand = None  # its memory is free again while the next one's is taken
            self._at_hand = number, list(self._read(number))
        return self._at_hand[1]

    def _read(self, number: int) -> Iterator[_Piece]:
        text, layer, cache = self._texts[number], self._layer, self._cache.layers[0]
        blocks_a_piece = max(1, BLOCKS_A_TEXT // max(1, self._count_pieces(len(text.ids))))
        for begin, step in self._steps(text, sparse=True):
            normed = ops.rms_norm(
                ops.tensor(text.residual[begin : begin + self._chunk]), layer.input_norm, self._config.rms_norm_eps
            )
            projected = layer.project(normed)
            where = step.rotary, step.slots, cache.keys, cache.values
            q = ops.rotate_and_cache(projected.qkv, projected.bias, *where)
            for sparse in step.sparse_pieces:
                if _is_measured(sparse.piece, len(text.ids)):
                    yield self._piece(number, sparse, step, q, projected, blocks_a_piece)

    def _count_pieces(self, length: int) -> int:
        chunk_len = self._config.dual_chunk.chunk_len
        begins = range(0, length, self._chunk)
        pieces = [one for begin in begins for one in cut(begin, min(begin + self._chunk, length), chunk_len)]
        return sum(piece.worth_choosing and _is_measured(piece, length) for piece in pieces)

    def _piece(
        self, number: int, sparse: SparsePiece, step: Step, q: paddle.Tensor, projected: Projected, blocks_a_piece: int
    ) -> _Piece:
        piece, cache = sparse.piece, self._cache.layers[0]
        blocks = _spread(piece, blocks_a_piece, ends_text=piece.end > len(self._texts[number].ids) - LAST_ROWS)
        positions = np.concatenate([np.arange(rows) + piece.begin + first for first, rows in _rows(piece, blocks)])
        measured = piece.row - piece.begin + positions
        if (number, piece.begin) not in self._known:
            first = piece.row + piece.rows - piece.probe_rows
            critical = projected.queries(sparse.critical_rotary, first)
            sums = ops.dca_probe(critical, cache.keys, sparse.block_table, piece.end, cache.chunk_len, sparse.scale)
            parts = [(0, piece.row + first, rows, piece.begin + first) for first, rows in _rows(piece, blocks)]
            out, lse = paddle.empty(q.shape[1:], q.dtype), paddle.empty(q.shape[1:3], "float32")
            pieces = paddle.to_tensor(np.asarray(parts, np.int32), place=paddle.CPUPlace())
            ops.dca_prefill(
                q, out, cache.keys, cache.values, step.block_tables, pieces, step.scale, cache.chunk_len, lse
            )  # fmt: skip
            heads = _rows_of(out, measured)
            behind = self._texts[number].residual[positions] + _floats(self._layer.linear(heads, "output_weight"))
            self._known[number, piece.begin] = _Known(
                sums, lse.numpy()[measured].astype(np.float64), _floats(heads).reshape(-1, *out.shape[1:]),
                np.square(behind).sum(axis=-1, dtype=np.float64),
            )  # fmt: skip
        return _Piece(sparse, q, self._known[number, piece.begin], blocks, positions, measured)

    def _measure(self, number: int, pairs: Pairs, with_change: bool) -> Kept:
        budgets = LayerBudgets(*(sizes.astype(np.int32) for sizes in pairs))
        shares, moves, visited = [], [], np.zeros(len(pairs.columns))
        pieces = self._pieces(number)
        for piece in pieces:
            lse, heads, keys = self._sparse(piece, budgets)
            shares.append(np.exp(lse - piece.known.lse))
            if with_change:
                moves.append(self._moved(heads, piece))
            visited += keys
        share = np.concatenate(shares)
        positions = np.concatenate([piece.positions for piece in pieces])
        last = positions >= len(self._texts[number].ids) - LAST_ROWS
        # Where they are too few for sparse attention, the last rows keep all.
        mean, kept = share.mean(axis=0), share[last].mean(axis=0) if last.any() else np.ones(share.shape[1])
        change = np.full_like(mean, np.nan)
        if with_change:
            moved, sizes = np.concatenate(moves), np.concatenate([piece.known.sizes for piece in pieces])
            changed = moved[last].mean(axis=0) / sizes[last].mean() if last.any() else 0.0
            change = (moved.mean(axis=0) / sizes.mean() + changed) / 2
        self._on_measured()
        return Kept(mean, kept, visited / (positions + 1).sum(), change)

    def _moved(self, heads: paddle.Tensor, piece: _Piece) -> npt.NDArray[np.float64]:
        """The squared norm, [n, H], by which each head of [n, H D] adds something else than in full attention."""
        out = _floats(heads).reshape(piece.known.out.shape)
        missing = (out - piece.known.out).transpose(1, 0, 2)
        return ((missing @ self._output_gram) * missing).sum(axis=-1, dtype=np.float64).T

    def _sparse(
        self, measured: _Piece, budgets: LayerBudgets
    ) -> tuple[npt.NDArray[np.float64], paddle.Tensor, npt.NDArray[np.float64]]:
        """lse of the rows measured, as _Known has it; their output [n, H D]; and how many keys each head visits there
        [H], whole blocks at most.
        """
        piece, cache, q = measured.sparse.piece, self._cache.layers[0], measured.q
        columns, slashes = ops.select_critical(
            *measured.known.sums, budgets.vertical, budgets.slash, budgets.max_vertical, budgets.max_slash
        )
        index = ops.sparse_index(columns, slashes, piece.begin, piece.rows, cache.chunk_len)
        out, lse = paddle.empty(q.shape[1:], q.dtype), paddle.empty(q.shape[1:3], "float32")
        where = piece.row, piece.begin, piece.rows, cache.chunk_len, measured.sparse.scale
        at_once = ops.on_gpu() and _sooner_at_once(piece, measured.blocks, q.shape[2])
        for first, count in [(0, piece.row_blocks)] if at_once else [(block, 1) for block in measured.blocks.tolist()]:
            ops.dca_sparse_prefill(
                q, out, cache.keys, cache.values, measured.sparse.block_table, index, *where, lse,
                first_block=first, num_blocks=count,
            )  # fmt: skip
        counts = np.asarray(index.counts.numpy(), np.int64)[:, measured.blocks]
        keys = BLOCK * counts[..., :3].sum(-1) + counts[..., 3:].sum(-1)
        heights = np.array([rows for _, rows in _rows(piece, measured.blocks)])
        causal = np.add.reduceat(measured.positions + 1, np.cumsum(heights) - heights)
        lse_of_rows = lse.numpy()[measured.rows].astype(np.float64)
        return lse_of_rows, _rows_of(out, measured.rows), np.minimum(keys * heights, causal).sum(-1).astype(np.float64)


def _rows_of(out: paddle.Tensor, rows: npt.NDArray[np.int64]) -> paddle.Tensor:
    """[n, H D] of out [T, H, D]."""
    return ops.gather_rows(out.reshape([out.shape[0], -1]), ops.tensor(rows))


def _floats(values: paddle.Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(ops.cast(values, "float32").numpy(), np.float32)


def _is_measured(piece: Piece, length: int) -> bool:
    return piece.end > MEASURED_FROM * length


def _sooner_at_once(piece: Piece, blocks: npt.NDArray[np.int64], heads: int) -> bool:
    """Whether a GPU computes all row blocks of a piece in less time than some of them one after the other."""
    return piece.row_blocks * heads < BLOCKS_ABREAST * len(blocks)


def _spread(piece: Piece, count: int, *, ends_text: bool) -> npt.NDArray[np.int64]:
    """Row blocks of a piece, `count` at most, its last one among them; the last two where the text ends in them."""
    many = piece.row_blocks
    blocks = many - 1 - np.arange(min(count, many), dtype=np.int64) * many // min(count, many)
    return np.unique([*blocks, max(0, many - 2)] if ends_text else blocks)


def _rows(piece: Piece, blocks: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Of row blocks: the first row in the piece, and how many."""
    return [(int(block) * BLOCK, min(BLOCK, piece.rows - int(block) * BLOCK)) for block in blocks]
