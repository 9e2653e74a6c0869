"""Texts before a layer: what pairs keep of its heads' attention to them, and what the layer makes of the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.attention.selector import LayerBudgets, Projected
from paddle_qwen1m.attention.step import SequenceRows, SparsePiece, Step, StepBuilder
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.calibrate.strategies import Kept, Pairs
from paddle_qwen1m.config import BLOCK, ModelConfig
from paddle_qwen1m.model import DecoderLayer

MEASURED_FROM = 0.5
"""Of a text: what is behind it has the most keys to choose from, and three quarters of the work."""
BLOCKS_A_PIECE = 8
"""Row blocks of a piece that are measured, spread evenly, its last one among them."""
LAST_ROWS = 64
"""Of a text, which count on their own."""


@dataclass
class Text:
    """Token ids int64 [T] and, float32 [T, hidden], their residual stream before the layer at hand."""

    ids: npt.NDArray[np.int64]
    residual: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Piece:
    """A sparse piece of a text before a layer. q: of the chunk that it is in. sums: what its probe found. blocks: those
    that are measured. lse: of the full attention of their rows, float64 [n, H], which stand at `positions`.
    """

    sparse: SparsePiece
    q: paddle.Tensor
    sums: tuple[paddle.Tensor, paddle.Tensor]
    blocks: npt.NDArray[np.int64]
    lse: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]


class Layer:
    """One layer and the texts before it, which are read in chunks of `chunk` tokens, as prompts are.

    cache: of one layer, with room for the longest text; keys and values of the text at hand.
    """

    def __init__(
        self, layer: DecoderLayer, config: ModelConfig, texts: Sequence[Text], cache: PagedCache, chunk: int
    ) -> None:
        self._layer, self._config, self._texts, self._cache, self._chunk = layer, config, texts, cache, chunk
        self._builder = StepBuilder(config)
        self._at_hand: tuple[int, list[_Piece]] | None = None

    def measure(self, pairs: Pairs, *, first_alone: bool = False) -> Kept:
        """What the pairs keep of the attention to all texts, or to the first one."""
        numbers = range(1 if first_alone else len(self._texts))
        kept = [self._measure(number, pairs) for number in numbers]
        return Kept(*(np.mean(column, axis=0) for column in zip(*kept)))

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
                ops.add_rms_norm(layer.mlp(normed), residual, layer.post_attention_norm, eps)
                text.residual[rows] = residual.numpy()
                yield len(text.residual[rows])

    def _attention(self, normed: paddle.Tensor, step: Step) -> paddle.Tensor:
        running = self._layer.attention(normed, step, self._cache.layers[0], None)
        while True:
            try:
                next(running)
            except StopIteration as end:
                out: paddle.Tensor = end.value
                return out

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
            self._at_hand = number, list(self._read(self._texts[number]))
        return self._at_hand[1]

    def _read(self, text: Text) -> Iterator[_Piece]:
        layer, cache = self._layer, self._cache.layers[0]
        for begin, step in self._steps(text, sparse=True):
            normed = ops.rms_norm(
                ops.tensor(text.residual[begin : begin + self._chunk]), layer.input_norm, self._config.rms_norm_eps
            )
            projected = Projected(ops.linear(normed, layer.qkv_weight), layer.qkv_bias)
            q = ops.rotate_and_cache(*projected, step.rotary, step.slots, cache.keys, cache.values)
            for sparse in step.sparse_pieces:
                if sparse.piece.end > MEASURED_FROM * len(text.ids):
                    yield self._piece(sparse, step, q, projected)

    def _piece(self, sparse: SparsePiece, step: Step, q: paddle.Tensor, projected: Projected) -> _Piece:
        piece, cache = sparse.piece, self._cache.layers[0]
        critical = ops.rotate_queries(
            *projected, sparse.critical_rotary, piece.row + piece.rows - piece.probe_rows, q.shape[2]
        )
        sums = ops.dca_probe(critical, cache.keys, sparse.block_table, piece.end, cache.chunk_len, sparse.scale)
        count = min(BLOCKS_A_PIECE, piece.row_blocks)
        blocks = piece.row_blocks - 1 - np.arange(count, dtype=np.int64)[::-1] * piece.row_blocks // count
        parts = [(0, piece.row + first, rows, piece.begin + first) for first, rows in _rows(sparse, blocks)]
        out, lse = paddle.empty(q.shape[1:], q.dtype), paddle.empty(q.shape[1:3], "float32")
        pieces = paddle.to_tensor(np.asarray(parts, np.int32), place=paddle.CPUPlace())
        ops.dca_prefill(
            q, out, cache.keys, cache.values, step.block_tables, pieces, step.scale, cache.chunk_len, lse
        )  # fmt: skip
        positions = np.concatenate([np.arange(begin, begin + rows) for _, _, rows, begin in parts])
        rows = piece.row - piece.begin + positions
        return _Piece(sparse, q, sums, blocks, lse.numpy()[rows].astype(np.float64), positions)

    def _measure(self, number: int, pairs: Pairs) -> Kept:
        budgets = LayerBudgets(*(sizes.astype(np.int32) for sizes in pairs))
        shares, visited, causal, positions = [], np.zeros(len(pairs.columns)), 0, []
        for piece in self._pieces(number):
            lse, keys = self._sparse_lse(piece, budgets)
            shares.append(np.exp(lse - piece.lse))
            visited += keys
            causal += int((piece.positions + 1).sum())
            positions.append(piece.positions)
        share = np.concatenate(shares)
        last = share[np.concatenate(positions) >= len(self._texts[number].ids) - LAST_ROWS]
        mean = share.mean(axis=0)
        # rows that are too few for sparse attention keep all
        return Kept(mean, last.mean(axis=0) if len(last) else np.ones_like(mean), visited / causal)

    def _sparse_lse(
        self, measured: _Piece, budgets: LayerBudgets
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of the rows measured [n, H]; and how many keys each head visits there [H], whole blocks at most."""
        piece, cache, q = measured.sparse.piece, self._cache.layers[0], measured.q
        columns, slashes = ops.select_critical(
            *measured.sums, budgets.vertical, budgets.slash, budgets.max_vertical, budgets.max_slash
        )
        index = ops.sparse_index(columns, slashes, piece.begin, piece.rows, cache.chunk_len)
        out, lse = paddle.empty(q.shape[1:], q.dtype), paddle.empty(q.shape[1:3], "float32")
        where = piece.row, piece.begin, piece.rows, cache.chunk_len, measured.sparse.scale
        for block in measured.blocks.tolist():
            ops.dca_sparse_prefill(
                q, out, cache.keys, cache.values, measured.sparse.block_table, index, *where, lse,
                first_block=block, num_blocks=1,
            )  # fmt: skip
        counts = np.asarray(index.counts.numpy(), np.int64)[:, measured.blocks]
        keys = BLOCK * counts[..., :3].sum(-1) + counts[..., 3:].sum(-1)
        heights = np.array([rows for _, rows in _rows(measured.sparse, measured.blocks)])
        causal = np.add.reduceat(measured.positions + 1, np.cumsum(heights) - heights)
        rows = piece.row - piece.begin + measured.positions
        return lse.numpy()[rows].astype(np.float64), np.minimum(keys * heights, causal).sum(-1).astype(np.float64)


def _rows(sparse: SparsePiece, blocks: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Of row blocks: the first row in the piece, and how many."""
    return [(int(block) * BLOCK, min(BLOCK, sparse.piece.rows - int(block) * BLOCK)) for block in blocks]
