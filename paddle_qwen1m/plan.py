"""Memory arithmetic: what weights, the KV cache of a context and one chunk of a prefill take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np

from paddle_qwen1m.config import (
    BLOCK,
    LANE_ROWS,
    QUESTION_ROWS,
    ROWS_AT_ONCE,
    ModelConfig,
    SparseBudgets,
    column_widths,
)
from paddle_qwen1m.dtypes import QUANTIZATIONS, itemsize
from paddle_qwen1m.parallel.room import FEW_LANES, LEAST_LANE_ROWS, Room
from paddle_qwen1m.weights.eight_bit import choose_blocks, linears
from paddle_qwen1m.weights.tensors import published_shapes

FEW_ROWS, SHARED_ROWS = 1024, 8192
"""Up to how many rows share their keys out, and rows times shares at most: custom_ops/cuda/shares.cuh."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that serving one context of `length` tokens takes."""

    length: int
    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def parameters(config: ModelConfig) -> int:
    """Number of weights of the model, biases and norms included."""
    return sum(map(math.prod, published_shapes(config).values()))


def weight_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of the weights, of `dtype` or where `quantization` says so the linears' of a byte each, with their scales.

    config: of the model, or of a rank's share.
    """
    whole = parameters(config) * itemsize(dtype)
    if quantization is None:
        return whole
    saved = 0
    for heights, widths in linears(config).values():
        shape = sum(heights), sum(widths)
        scales = math.prod(choose_blocks(quantization, heights, widths).grid(shape))
        saved += math.prod(shape) * (itemsize(dtype) - 1) - 4 * scales
    return whole - config.num_layers * saved


def widened_weight_bytes(config: ModelConfig, quantization: str | None, dtype: str) -> int:
    """Bytes of weights of 8 bits in 16, for as long as products of many rows read them so: the MLP's two, which lanes
    go through together. A CPU, which computes in float32, widens tiles of a few MB.
    """
    if quantization is None or itemsize(dtype) != 2:
        return 0
    sizes = {name: 2 * sum(heights) * sum(widths) for name, (heights, widths) in linears(config).items()}
    return max(sizes["gate_up_weight"] + sizes["down_weight"], *sizes.values())


def cache_bytes_per_token(config: ModelConfig, dtype: str, in_16_bits: int = 0) -> int:
    """Bytes that the keys and values of one token take over all layers, their scales included.

    in_16_bits: layers of an 8-bit cache that stay in 16 bits.
    """
    numbers = 2 * config.num_kv_heads * config.head_dim
    if dtype not in QUANTIZATIONS:
        return config.num_layers * numbers * itemsize(dtype)
    return (config.num_layers + in_16_bits) * numbers + scale_bytes_per_token(config, dtype, in_16_bits)


def scale_bytes_per_token(config: ModelConfig, dtype: str, in_16_bits: int = 0) -> int:
    """Those of them that are scales: float16 numbers of an 8-bit cache, for the key and the value of each KV head."""
    return 2 * (config.num_layers - in_16_bits) * config.num_kv_heads * 2 if dtype in QUANTIZATIONS else 0


def widened_bytes(config: ModelConfig, length: int, cache_dtype: str, dtype: str) -> int:
    """Bytes of the room where a layer's 8-bit keys and values of a context are copied for kernels that read 16 bits; a
    CPU, which computes in float32, has none.
    """
    if cache_dtype not in QUANTIZATIONS or itemsize(dtype) != 2:
        return 0
    return 2 * length * config.num_kv_heads * config.head_dim * itemsize(dtype)


def sparse_bytes(config: ModelConfig, rows: int, length: int, budgets: SparseBudgets, dtype: str = "float32") -> int:
    """Bytes that choosing keys for `rows` tokens takes in the layer that takes most.

    The float32 sums of every head's columns and diagonals over all keys; then, without these, what is visited: int32
    columns of every head, as wide as the largest budget of the layer, and for each block of rows a bit for each of them
    and int32 blocks, no more than the keys hold, made from a chain of blocks for each of the three stages. In 16 bits,
    on a GPU, the keys and values of the columns are copied together. With either the columns and diagonals that were
    chosen.
    """
    columns, diagonals = (min(int(sizes.max()), length) for sizes in (budgets.vertical, budgets.slash))
    widths = np.sort(column_widths(np.minimum(budgets.vertical, length)))[:, -config.num_heads :]
    width, row_blocks = int(widths.max()), -(-rows // BLOCK)
    copied = 2 * int(widths.sum(axis=1).max()) * config.head_dim * 2 if itemsize(dtype) == 2 else 0
    visited = row_blocks * (4 * min(diagonals, length // BLOCK) + width // 8) + 4 * width
    choosing = max(8 * config.num_heads * length, config.num_heads * (visited + 12 * diagonals) + copied)
    return 4 * config.num_heads * (columns + diagonals) + choosing


def lane_rows(rows: int, degree: int) -> int:
    """How many of so many rows of a chunk go through the MLP at once, at most. In FP8 there are more, which take less;
    lanes of several ranks (`lanes_of`) have fewer than this.
    """
    if degree > 1:
        return min(rows, max(ROWS_AT_ONCE, -(-rows // FEW_LANES)))
    return min(rows, LANE_ROWS + LEAST_LANE_ROWS - 1)


def activation_bytes(
    config: ModelConfig,
    rows: int,
    length: int,
    budgets: SparseBudgets | None = None,
    dtype: str = "float32",
    degree: int = 1,
) -> int:
    """Peak bytes of a layer over a chunk of `rows` tokens of a context of `length`, logits of the last one included.

    Counts the residual and rotary tables, then the largest of attention (qkv, output, and of rows_at_once their
    rotations and with `budgets` what choosing the keys takes), the projection of what it gives, and MLP (its input, and
    of a lane gate and up, their product). The residual, rotary tables and logits are float32, the rest is of `dtype`.
    degree: of ranks of which `config` is one's share, and whose lanes go in rooms, where normed rows lie: a rank has a
    share of the residual, and before the first layer its part of all embeddings, float32, until a collective has added
    them up.
    """
    attention, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    chunk_len = config.dual_chunk.chunk_len
    variants = min(3, -(-length // chunk_len))
    size = itemsize(dtype)
    of_rows, of_lane, of_span = size * rows, size * lane_rows(rows, degree), min(rows, config.rows_at_once)
    choosing = 0 if budgets is None else sparse_bytes(config, of_span, length, budgets, dtype)
    if degree == 1:
        residual, embedded, normed = 4 * rows * config.hidden_size, 0, of_rows * config.hidden_size
    else:
        share = Room.of(rows, config.hidden_size, degree, size).share
        residual, embedded, normed = 4 * share * config.hidden_size, 4 * rows * config.hidden_size, 0
    in_attention = of_rows * (2 * attention + 2 * kv) + variants * size * of_span * attention + choosing
    behind_it = normed + of_rows * attention + of_lane * config.hidden_size
    in_mlp = normed + of_lane * (3 * config.intermediate_size + config.hidden_size)
    tables = 4 * variants * rows * config.head_dim
    return residual + tables + max(embedded, in_attention, behind_it, in_mlp) + 4 * config.vocab_size


def room_bytes(config: ModelConfig, rows: int, dtype: str, degree: int) -> int:
    """Bytes of the room that the other ranks bring rows of chunks of up to `rows` tokens into; on a GPU, in 16 bits."""
    if degree == 1 or itemsize(dtype) != 2:
        return 0
    room = Room.of(rows, config.hidden_size, degree, itemsize(dtype))
    return room.height * room.row_bytes


def prefill_bytes(
    config: ModelConfig,
    rows: int,
    length: int,
    budgets: SparseBudgets | None = None,
    dtype: str = "float32",
    degree: int = 1,
) -> int:
    """Peak bytes of a layer over chunks of up to `rows` tokens of a context of `length`.

    In 16 bits, on a GPU, a chunk of few rows may share its keys out: what each share made of a row, in float32, is kept
    with its largest logit and sum until the shares are merged. There the lanes of ranks go in rooms, too.
    """
    if itemsize(dtype) != 2:
        return activation_bytes(config, rows, length, budgets, dtype)
    whole = activation_bytes(config, rows, length, budgets, dtype, degree)
    shares = SHARED_ROWS * config.num_heads * 4 * (config.head_dim + 2)
    return max(whole, activation_bytes(config, min(rows, FEW_ROWS), length, budgets, dtype) + shares)


def sampling_bytes(capacity: int, vocab_size: int) -> int:
    """Bytes of what `capacity` answers are sampled by, engine.sampling.SamplingSlots.

    Of the vocabulary: counts int16, biases float32, a mask of bits. Besides: six float32 numbers, int32 top_k, two
    flags of a byte, int64 seed and step.
    """
    return capacity * (vocab_size * (2 + 4) + 4 * -(-vocab_size // 32) + 6 * 4 + 4 + 2 + 8 + 8)


class Workspace(NamedTuple):
    """Bytes of a rank's memory beside weights and cache. steps: of tensors that come and go with steps; beside them
    what is made with the cache and stays, `kept`, and what captured steps hold, `graphs`.
    """

    steps: int
    kept: int
    graphs: int

    @property
    def total(self) -> int:
        return sum(self)


def plan_workspace(
    config: ModelConfig,
    length: int,
    *,
    max_num_batched_tokens: int,
    max_pause_tokens: int,
    max_num_seqs: int,
    budgets: SparseBudgets | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    degree: int = 1,
) -> Workspace:
    """Peak of all that may be under way at once while contexts of up to `length` tokens are served.

    Steps: a chunk of a long prompt that stands at a pause, short prompts that are read meanwhile, and the decode rows
    with their logits. A GPU's allocator finds room in one piece or none: where smaller tensors lie between, one as
    large as a lane's gated product may not fit into what is free. Kept: the room of several ranks' lanes, and what is
    sampled by, of first tokens beside that of all others. Graphs: of 1, 2, 4, ... rows, together as much as a step of
    all, and those that read questions what their rows need; on a GPU, where what is computed has 16 bits.
    """
    rows, on_gpu = min(length, max_num_batched_tokens), itemsize(dtype) == 2
    chunk = prefill_bytes(config, rows, length, budgets, dtype, degree)
    chunk += widened_weight_bytes(config, quantization, dtype)
    vocab_size = degree * config.vocab_size
    logits = vocab_size if degree == 1 else vocab_size + config.vocab_size  # gathered beside a rank's own
    decode = activation_bytes(config, max_num_seqs, length, None, dtype) + 4 * max_num_seqs * logits
    graphs = 0
    if on_gpu:
        chunk += 2 * lane_rows(rows, degree) * config.intermediate_size
        graphs = decode + activation_bytes(config, sum(QUESTION_ROWS), length, None, dtype)
    if max_num_seqs == 1:  # nothing is read in the pauses of the one there is
        steps = max(chunk, decode)
    else:
        steps = chunk + prefill_bytes(config, min(length, max_pause_tokens), length, budgets, dtype) + decode
    sampling = 2 * sampling_bytes(max_num_seqs, vocab_size)
    return Workspace(steps, room_bytes(config, rows, dtype, degree) + sampling, graphs)


def plan_memory(
    config: ModelConfig,
    length: int,
    *,
    max_num_batched_tokens: int,
    cache_dtype: str,
    weight_bytes: int,
    budgets: SparseBudgets | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    degree: int = 1,
) -> MemoryPlan:
    """What one request of `length` tokens, prompt and answer together, needs beside the process itself.

    budgets: of a sparse prefill; None when it is dense. dtype: what is computed in, float32 on a CPU. degree: of ranks
    of which `config` is one's share.
    """
    if length < 1 or max_num_batched_tokens < 1:
        raise ValueError(
            f"length and max_num_batched_tokens must be at least 1, got {length} and {max_num_batched_tokens}"
        )
    rows = min(length, max_num_batched_tokens)
    return MemoryPlan(
        length=length,
        weights=weight_bytes,
        cache=length * cache_bytes_per_token(config, cache_dtype),
        activations=prefill_bytes(config, rows, length, budgets, dtype, degree)
        + room_bytes(config, rows, dtype, degree)
        + widened_bytes(config, length, cache_dtype, dtype)
        + widened_weight_bytes(config, quantization, dtype),
    )


def longest_context(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The longest context up to `limit` tokens that fits, as all shorter ones do; None when not one token does."""
    if not fits(1):
        return None
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
