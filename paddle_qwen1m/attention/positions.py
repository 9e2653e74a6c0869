"""Where dual chunk attention puts tokens: rotary positions of each query variant and the pieces of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paddle_qwen1m.config import BLOCK, DualChunkConfig, ModelConfig
from paddle_qwen1m.ops import PROBE_ROWS


@dataclass(frozen=True)
class Piece:
    """Queries of one sequence inside one DCA chunk: rows [row, row + rows) of a step at positions [begin, end)."""

    row: int
    begin: int
    rows: int

    def __post_init__(self) -> None:
        assert self.row >= 0 and self.begin >= 0 and self.rows > 0

    @property
    def end(self) -> int:
        return self.begin + self.rows

    @property
    def worth_choosing(self) -> bool:
        """Whether keys are chosen, in a sparse prefill. As few rows as the probe's attend to all keys for less."""
        return self.rows > PROBE_ROWS

    @property
    def probe_rows(self) -> int:
        """The last rows, whose critical queries choose what the piece visits."""
        return min(PROBE_ROWS, self.rows)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 rows, the last one with fewer."""
        return -(-self.rows // BLOCK)

    def split(self, rows: int) -> tuple[Piece, Piece | None]:
        """The piece's first `rows` rows, and those behind them if there are any."""
        if rows >= self.rows:
            return self, None
        return self._part(0, rows), self._part(rows, self.rows)

    def blocks(self, first: int, count: int) -> Piece:
        """Of its row blocks `count` from number `first` on, fewer at its end."""
        return self._part(first * BLOCK, min((first + count) * BLOCK, self.rows))

    def around(self, rows: np.ndarray) -> Piece | None:
        """From the row block of the first of those `rows` of the step, int64 [n], that are the piece's to the last of
        them; None without any.
        """
        own = rows[(rows >= self.row) & (rows < self.row + self.rows)] - self.row
        if len(own) == 0:
            return None
        skipped, end = int(own.min()) // BLOCK * BLOCK, int(own.max()) + 1
        return self._part(skipped, end)

    def _part(self, first: int, end: int) -> Piece:
        """Its rows [first, end)."""
        return Piece(self.row + first, self.begin + first, end - first)


def pieces(begin: int, end: int, chunk_len: int, row: int = 0) -> Iterator[Piece]:
    """Cuts positions [begin, end) at multiples of chunk_len; the first stands in row `row` of the step."""
    while begin < end:
        stop = min((begin // chunk_len + 1) * chunk_len, end)
        yield Piece(row, begin, stop - begin)
        row += stop - begin
        begin = stop


def inv_freq(config: ModelConfig) -> np.ndarray:
    """Radians that a token turns each rotation pair by, float32 [D / 2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    return np.float32(1.0) / np.float32(config.rope_theta) ** exponents


def num_variants(length: int, chunk_len: int) -> int:
    """Query variants that a sequence of `length` tokens needs: intra alone, with succ, with inter."""
    return min(3, (length - 1) // chunk_len + 1)


def query_positions(positions: np.ndarray, dual_chunk: DualChunkConfig, variants: int) -> np.ndarray:
    """Rotary positions int32 [variants, T] of queries at `positions` [T]; row 0 is that of the cached key as well.

    intra: r = p mod L; succ: min(r + L, chunk_size); inter: min(2L - 1, chunk_size).
    """
    length, size = dual_chunk.chunk_len, dual_chunk.chunk_size
    offsets = positions % length
    rows = [offsets, np.minimum(offsets + length, size), np.full_like(offsets, min(2 * length - 1, size))]
    return np.stack(rows[:variants]).astype(np.int32)


def critical_positions(positions: np.ndarray, dual_chunk: DualChunkConfig, variants: int) -> np.ndarray:
    """The same for the queries that choose critical keys: continuous, not clamped (r, r + L, r + chunk_size)."""
    offsets = positions % dual_chunk.chunk_len
    rows = [offsets, offsets + dual_chunk.chunk_len, offsets + dual_chunk.chunk_size]
    return np.stack(rows[:variants]).astype(np.int32)
