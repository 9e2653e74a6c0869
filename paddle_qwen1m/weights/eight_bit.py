"""Weights of 8 bits: which of them, in which blocks each has a scale, and how files of this package hold them.

Those of a layer's linears become bytes, int8 or FP8 (E4M3) numbers, with a float32 scale a block: of int8 a part of a
row, of FP8 a square as large as the FP8 products of Hopper take. Embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Callable, NamedTuple

import numpy as np

from paddle_qwen1m.dtypes import FP8, INT8

from .safetensors import Array, CheckpointError, TensorInfo, read_rows

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

LARGEST_BLOCK, LEAST_COLUMNS = 128, 16
FILE_DTYPES = {FP8: "F8_E4M3", INT8: "I8"}
"""How safetensors spells the numbers."""
FILE_KINDS = {dtype: kind for kind, dtype in FILE_DTYPES.items()}
SCALES = "_scales"
"""What the name of the scales, in files and in the model, has behind that of the numbers."""


class Blocks(NamedTuple):
    """The values that share a scale."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a weight of that shape has, down and across; the last ones may stand out."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


FILE_BLOCKS = {FP8: Blocks(LARGEST_BLOCK, LARGEST_BLOCK), INT8: Blocks(1, LARGEST_BLOCK)}
"""Of each published tensor in files; the last ones may stand out."""


LOSSES = {
    FP8: "each weight within 1/16 of itself, or where that is less within 1/450,000 of the largest of its 128 x 128",
    INT8: "each weight within 1/254 of the largest of its 128",
}
"""What rounding takes, which the way back does not return."""


def is_linear(name: str) -> bool:
    """Whether a published tensor is among those that become bytes."""
    return name.endswith("_proj.weight")


def choose_blocks(kind: str, heights: Iterable[int], widths: Sequence[int]) -> Blocks:
    """Blocks of a weight that is put together of parts of these heights, and each of parts of these widths: the largest
    powers of two up to 128 that divide all of them. ValueError for a width that is too odd.
    """
    columns = math.gcd(LARGEST_BLOCK, *widths)
    if columns < LEAST_COLUMNS:
        raise ValueError(
            f"quantization={kind!r} needs linear layers whose widths are multiples of {LEAST_COLUMNS}, got {widths[0]}"
        )
    return Blocks(math.gcd(LARGEST_BLOCK, *heights) if kind == FP8 else 1, columns)


def linears(local: ModelConfig) -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The weights of a layer of a rank's share, by parameter: heights and widths of the parts that they are put
    together of, a head each where a rank may have heads from anywhere.
    """
    hidden, inner = (local.hidden_size,), (local.intermediate_size,)
    head = (local.head_dim,)
    return {
        "qkv_weight": (head * (local.num_heads + 2 * local.num_kv_heads), hidden),
        "output_weight": (hidden, head * local.num_heads),
        "gate_up_weight": (2 * inner, hidden),
        "down_weight": (hidden, inner),
    }


def numbers_of(kind: str) -> Array:
    """What each of the 256 bytes stands for, float32; of FP8 without the two that are no numbers."""
    numbers = np.arange(256, dtype=np.uint8)
    if kind == INT8:
        return numbers.view(np.int8).astype(np.float32)
    halves = ((numbers & 0x80).astype(np.uint16) << 8) | ((numbers & 0x7F).astype(np.uint16) << 7)
    return halves.view(np.float16).astype(np.float32) * np.float32(256)  # one bit more of exponent


def widen(kind: str, numbers: Array, scales: Array) -> Array:
    """What numbers uint8 [n, K] with those scales of a file, [n, K / columns of a block], stand for, float32."""
    wide: Array = numbers_of(kind)[numbers] * np.repeat(scales, LARGEST_BLOCK, axis=1)[:, : numbers.shape[1]]
    return wide


def round_tensor(values: Array, dtype: str, kind: str, numbers: Array, scales: Array, source: str) -> None:
    """`ops.round_weight`; CheckpointError, naming `source`, for values that are not finite."""
    from paddle_qwen1m import ops

    if not ops.round_weight(values, dtype, kind, numbers, scales):
        raise CheckpointError(f"{source} holds values that are not finite: they have no place in 8 bits")


def read_scales(
    open_file: Callable[[Path], io.RawIOBase], name: str, info: TensorInfo, kind: str, rows: Array, columns: Array
) -> Array:
    """The scales float32 [rows, columns] that a file has for values of tensor `name` at these rows, ascending, and
    columns; of the file no more rows of blocks are read than these lie in. info: of the scales.
    """
    blocks = FILE_BLOCKS[kind]
    first, last = int(rows[0]) // blocks.rows, int(rows[-1]) // blocks.rows + 1
    stored = np.empty((last - first, info.shape[1]), np.float32)
    read_rows(open_file(info.file), f"{name}{SCALES}", info, stored.reshape(-1), "F32", (first, last))
    return scales_of(stored, blocks, rows - first * blocks.rows, columns)


def scales_of(stored: Array, blocks: Blocks, rows: Array, columns: Array) -> Array:
    """The scales float32 [rows, columns] of values that lie at these rows and columns of what `stored` is of."""
    found: Array = stored[np.ix_(rows // blocks.rows, columns // blocks.columns)]
    return found
