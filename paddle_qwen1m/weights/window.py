"""Reads a range of rows of a tensor that lies in files in one piece or several, as it is or transposed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import numpy as np

from .safetensors import Array, TensorInfo, read_rows

BLOCK_BYTES = 2 << 20  # of the file, read before it is placed
TILE_ROWS, TILE_COLUMNS = 64, 512  # of a transposed block: stays in the first two caches


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or those `rows` and `columns` [begin, end) of it, whose first element is element (row, column)
    of a matrix; vectors are matrices of one column.
    """

    name: str
    info: TensorInfo
    row: int = 0
    column: int = 0
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Which rows and columns of the stored tensor it is."""
        height, width = as_matrix(self.info.shape)
        return self.rows or (0, height), self.columns or (0, width)

    @property
    def height(self) -> int:
        begin, end = self.stored[0]
        return end - begin

    @property
    def width(self) -> int:
        begin, end = self.stored[1]
        return end - begin

    def flipped(self) -> Piece:
        """The same piece of the transposed matrix."""
        return Piece(self.name, self.info.flipped(), self.column, self.row, self.columns, self.rows)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of one or two dimensions. ValueError for more."""
    if len(shape) > 2:
        raise ValueError(f"weights have one or two dimensions, got shape {list(shape)}")
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns


def read_matrix(
    file: io.RawIOBase,
    name: str,
    info: TensorInfo,
    out: Array,
    dtype: str,
    rows: tuple[int, int],
    columns: Sequence[tuple[int, int]] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """`safetensors.read_rows` of a matrix that may lie transposed in its file; asks the file for no more than that.

    out: [rows, width], strided in any way, for those ranges of columns side by side, None for all.
    """
    at = 0
    for first, last in columns or [(0, as_matrix(info.shape)[1])]:
        target, at = out[:, at : at + last - first], at + last - first
        if info.transposed:
            _read_transposed(file, name, info, target, dtype, rows, (first, last), on_bytes)
        elif target.flags.c_contiguous:
            read_rows(file, name, info, target.reshape(-1), dtype, rows, (first, last), on_bytes)
        else:
            step = max(1, BLOCK_BYTES // max(1, (last - first) * out.itemsize))
            for start in range(0, len(target), step):
                stop = min(start + step, len(target))
                block = np.empty((stop - start, last - first), out.dtype)
                own = rows[0] + start, rows[0] + stop
                read_rows(file, name, info, block.reshape(-1), dtype, own, (first, last), on_bytes)
                target[start:stop] = block


def _read_transposed(
    file: io.RawIOBase,
    name: str,
    info: TensorInfo,
    target: Array,
    dtype: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    on_bytes: Callable[[int], None] | None,
) -> None:
    stored = info.flipped()
    height, (first, last) = rows[1] - rows[0], columns
    step = max(1, BLOCK_BYTES // max(1, height * target.itemsize))
    block = np.empty(min(step, last - first) * height, target.dtype)
    for start in range(first, last, step):
        stop = min(start + step, last)
        part = block[: (stop - start) * height]
        read_rows(file, name, stored, part, dtype, (start, stop), rows, on_bytes)
        transpose(part.reshape(-1, height), target[:, start - first : stop - first])


def read_window(
    open_file: Callable[[Path], io.RawIOBase], pieces: Sequence[Piece], first_row: int, out: Array, dtype: str
) -> None:
    """Fill `out` [rows, width], contiguous, in the storage of `dtype`, with the matrix' rows from `first_row` on.

    The pieces cover the matrix without overlaps. One that lies transposed is walked through whole, however few
    rows are wanted. Errors as in `safetensors.read_rows`.
    """
    for piece in pieces:
        begin, end = max(first_row, piece.row), min(first_row + len(out), piece.row + piece.height)
        if begin >= end or not piece.width:
            continue
        target = out[begin - first_row : end - first_row, piece.column : piece.column + piece.width]
        (stored_row, _), columns = piece.stored
        rows = stored_row + begin - piece.row, stored_row + end - piece.row
        info = replace(piece.info, shape=as_matrix(piece.info.shape))
        read_matrix(open_file(piece.info.file), piece.name, info, target, dtype, rows, [columns])


def transpose(source: Array, target: Array) -> None:
    """target = source.T, tile by tile: numpy alone walks through one of the two against its cache lines."""
    height, width = source.shape
    for row in range(0, height, TILE_ROWS):
        for column in range(0, width, TILE_COLUMNS):
            tile = source[row : row + TILE_ROWS, column : column + TILE_COLUMNS]
            target[column : column + TILE_COLUMNS, row : row + TILE_ROWS] = tile.T
