"""Python face of the custom ops: one function an op, one signature on every device.

Shapes use these letters: T rows (tokens) of a step, S sequences, H query heads, G KV heads, D head_dim, V query
variants (1 to 3, in the order of `Stage`), M keys that the last row of a piece sees, R row blocks of a piece.

Attention reads a paged cache: `key_cache` and `value_cache` are [pages, page_size, G, D]; a sequence's block table
lists its pages in order. Cached keys are rotated at p mod L and never multiplied by the temperature: the caller puts
m(n)^2 into `scale`. L is `chunk_len` = chunk_size - local_size, a multiple of page_size.

An op runs where its tensors lie, all on one device. Activations are float32 on a CPU, where weights and caches are
float32, bfloat16 or float16; on a GPU activations, weights and caches are of one type, bfloat16 or float16, and a page
holds a power of two of tokens, at least 64. The residual stream, rotary tables, scales, LSE, sums and logits are
float32 everywhere.

Shapes and types are checked as the op is called (custom_ops/paddle); what does not fit raises ValueError naming the op,
the argument and what it got. Values (ids, slots, lengths, pages) are checked on a CPU only: on a GPU an op launches its
kernels and does not wait.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import paddle
from paddle.base import core
from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

from paddle_qwen1m.config import BLOCK, LOCAL_DIAGONALS, SINK_COLUMNS
from paddle_qwen1m.threads import default_num_threads

LIBRARY = Path(__file__).with_name("_ops.so")
PROBE_ROWS = 64
FEW_ROWS = 16
"""Up to so many rows a linear layer on a GPU is a custom op, which reads the weights once; above, a GEMM of cuBLAS."""


class Stage(IntEnum):
    """Which rotation of a query meets a key: same DCA chunk, the one before, any earlier one."""

    INTRA = 0
    SUCC = 1
    INTER = 2


class SparseIndex(NamedTuple):
    """What every head visits in every block of 64 rows of one piece (spec section 6, the three stages side by side).

    blocks: int32 [H, R, B] absolute first keys of 64-key blocks, not aligned; ascending: inter, then succ, then intra.
    columns: int32 [H, R, C] absolute keys, ascending in the same order; none lies in a block of its stage.
    counts: int32 [H, R, 6]: blocks of intra, succ, inter, then columns of intra, succ, inter. Entries past the counts
    are undefined.
    """

    blocks: paddle.Tensor
    columns: paddle.Tensor
    counts: paddle.Tensor


_registered = False


def load() -> None:
    """Register the ops with Paddle, once. Raises ImportError, saying what to do, when the package was not built.

    Where Paddle's device is a GPU that the ops cannot use, a warning says why and the device becomes the CPU.
    """
    global _registered
    if _registered:
        return
    if not LIBRARY.exists():
        raise ImportError(
            f"{LIBRARY} is missing: the custom ops were not built; run `pip install . --no-build-isolation`"
        )
    load_op_meta_info_and_register_op(str(LIBRARY))
    _registered = True
    set_num_threads(default_num_threads())
    if not paddle.device.get_device().startswith("cpu"):
        obstacle = gpu_obstacle()
        if obstacle is not None:
            warnings.warn(f"{obstacle}: Paddle's device is set to cpu", stacklevel=2)
            paddle.device.set_device("cpu")


def gpu_obstacle() -> str | None:
    """Why the ops cannot run on Paddle's GPU, or None when they can."""
    if not paddle.device.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        return "Paddle has no NVIDIA GPU"
    if not hasattr(_library(), "qwen1m_cuda_linear"):
        return "the custom ops were built without CUDA kernels"
    major, minor = paddle.device.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


def on_gpu() -> bool:
    """Whether tensors are made on a GPU now, by `paddle.device.set_device` or by Paddle's default."""
    load()
    return paddle.device.get_device().startswith("gpu")


def _call(name: str, *arguments: object) -> list[paddle.Tensor]:
    load()
    try:
        result = core.eager._run_custom_op(f"qwen1m_{name}", *arguments)
    except (OSError, RuntimeError, ValueError) as error:
        reason = re.search(r"\[qwen1m\] (.*?) \[/qwen1m\]", str(error), re.DOTALL)
        if reason is None:
            raise
        raise ValueError(f"{name}: {reason.group(1)}") from None
    return result if isinstance(result, list) else [result]


def _library() -> ctypes.CDLL:
    load()
    return ctypes.CDLL(str(LIBRARY))


def set_num_threads(count: int) -> None:
    """Threads that every CPU op uses from now on."""
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, got {count}")
    _library().qwen1m_cpu_set_num_threads(count)


def cpu_isa() -> str:
    """Instruction set of the CPU ops: avx512, avx2 or generic; the environment variable QWEN1M_CPU_ISA narrows it."""
    name = _library().qwen1m_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


def embedding(
    ids: paddle.Tensor, table: paddle.Tensor, *, first: int = 0, vocabulary: int | None = None
) -> paddle.Tensor:
    """Rows `ids` (int64 [T]) of `table` [rows, N]: the residual stream, float32 [T, N].

    A table that holds a part of a vocabulary, its rows from `first` on, gives zeros for the ids of other parts.
    """
    return _call("embedding", ids, table, first, table.shape[0] if vocabulary is None else vocabulary)[0]


def rms_norm(hidden: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight over the last axis of float32 [T, N], as activations."""
    return _call("rms_norm", hidden, weight, eps)[0]


def add_rms_norm(delta: paddle.Tensor, residual: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
    """Adds `delta` [T, N] to `residual` float32 in place and returns the RMSNorm of the sum, as activations."""
    return _call("add_rms_norm", delta, residual, weight, eps)[1]


def linear(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None, *, float32: bool = False
) -> paddle.Tensor:
    """x [T, K] times the transpose of `weight` [N, K] (as published, out by in), plus `bias` [N]: [T, N].

    The result is activations, or float32 when asked for. On a GPU more than FEW_ROWS rows are multiplied by Paddle's
    matmul, which rounds to the activations' type first and takes no bias (ValueError).
    """
    if x.shape[0] <= FEW_ROWS or not x.place.is_gpu_place():
        return _call("linear", x, weight, bias, float32)[0]
    if bias is not None:
        raise ValueError(f"linear: bias must be None for more than {FEW_ROWS} rows on a GPU, got {x.shape[0]} rows")
    y = paddle.matmul(x, weight, transpose_y=True)
    return cast(y, "float32") if float32 else y


def cast(values: paddle.Tensor, dtype: str) -> paddle.Tensor:
    """`values` as "float32", "bfloat16" or "float16", rounded to nearest even."""
    return _call("cast", values, dtype)[0]


def silu_mul(gate_up: paddle.Tensor) -> paddle.Tensor:
    """SiLU of the left half of [T, 2I] times its right half: [T, I]."""
    return _call("silu_mul", gate_up)[0]


def gather_rows(hidden: paddle.Tensor, rows: paddle.Tensor) -> paddle.Tensor:
    """Rows `rows` (int64 [n]) of `hidden` [T, N], activations or float32."""
    return _call("gather_rows", hidden, rows)[0]


def rotary_table(positions: paddle.Tensor, inv_freq: paddle.Tensor) -> paddle.Tensor:
    """cos | sin of positions (int32 [V, T]) times inv_freq (float32 [D/2]), the product in float32: [V, T, D]."""
    return _call("rotary_table", positions, inv_freq)[0]


def rotate_and_cache(
    qkv: paddle.Tensor,
    bias: paddle.Tensor,
    table: paddle.Tensor,
    slots: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
) -> paddle.Tensor:
    """Adds the bias to qkv [T, (H + 2G) D], writes keys rotated by table[0] and values, returns q [V, T, H, D].

    `table` is a `rotary_table` of V variants; slots (int64 [T]) are page * page_size + offset. The caches are written
    in place, rounded once to their type.
    """
    return _call("rotate_and_cache", qkv, bias, table, slots, key_cache, value_cache)[2]


def rotate_queries(
    qkv: paddle.Tensor, bias: paddle.Tensor, table: paddle.Tensor, row: int, heads: int
) -> paddle.Tensor:
    """Biased queries of rows [row, row + n) of qkv, rotated by each variant of table [V, n, D]: [V, n, H, D]."""
    return _call("rotate_queries", qkv, bias, table, row, heads)[0]


def dca_prefill(
    q: paddle.Tensor,
    out: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_tables: paddle.Tensor,
    pieces: paddle.Tensor,
    scale: paddle.Tensor,
    chunk_len: int,
    lse: paddle.Tensor | None = None,
) -> None:
    """Dense dual chunk attention of a step's pieces; writes their rows of out [T, H, D] (spec section 4).

    q is [V, T, H, D]; pieces int32 [P, 4] are (sequence, first row, rows, position of the first row), each within one
    DCA chunk; block_tables int32 [S, W]; scale float32 [S] is D^-0.5 m^2 of each sequence. lse float32 [T, H], when
    given, receives the natural log of the sum of exp(scaled logits).
    """
    _call("dca_prefill", q, out, key_cache, value_cache, block_tables, pieces, scale, lse, chunk_len)


def dca_decode(
    q: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_tables: paddle.Tensor,
    lengths: paddle.Tensor,
    scale: paddle.Tensor,
    chunk_len: int,
) -> paddle.Tensor:
    """The last token of each of B sequences against all its keys: q [V, B, H, D] to [B, H, D] (spec section 9).

    lengths int32 [B] count the token itself, whose key is in the cache; block_tables int32 [B, W]; scale float32 [B].
    """
    return _call("dca_decode", q, key_cache, value_cache, block_tables, lengths, scale, chunk_len)[0]


def decode_inputs(
    lengths: paddle.Tensor,
    block_tables: paddle.Tensor,
    inv_freq: paddle.Tensor,
    page_size: int,
    chunk_len: int,
    chunk_size: int,
    original_max_position_embeddings: int,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Where the next token of each of B sequences goes and how it is rotated; their lengths grow by one in place.

    lengths int32 [B], block_tables int32 [B, W], inv_freq float32 [D/2]. Returns slots int64 [B], the rotary table of
    all three variants float32 [3, B, D], and the scales D^-0.5 m(length)^2 float32 [B].
    """
    _, slots, table, scale = _call(
        "decode_inputs",
        lengths,
        block_tables,
        inv_freq,
        page_size,
        chunk_len,
        chunk_size,
        original_max_position_embeddings,
    )
    return slots, table, scale


def dca_probe(
    q: paddle.Tensor, key_cache: paddle.Tensor, block_table: paddle.Tensor, end: int, chunk_len: int, scale: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Softmax of a piece's last critical queries over keys [0, end), summed by column and by diagonal (spec 5.1-5.3).

    q [V, n, H, D], n <= 64, are the critical rotations of the rows that end at position end - 1; block_table int32 [W].
    Returns vertical and slash, float32 [H, end]; slash is indexed by the column that a diagonal hits on the last row.
    """
    vertical, slash = _call("dca_probe", q, key_cache, block_table, end, chunk_len, scale)
    return vertical, slash


def select_critical(
    vertical: paddle.Tensor,
    slash: paddle.Tensor,
    vertical_sizes: paddle.Tensor,
    slash_sizes: paddle.Tensor,
    max_vertical: int,
    max_slash: int,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Each head's best columns and diagonals: int32 [H, min(max, M)], ascending, padded with INT32_MAX (spec 5.2-5.4).

    The first 30 columns and the last 100 slash columns come first, then the largest sums, ties to the lower index.
    Sizes are int32 [H], at most `max_vertical` and `max_slash`.
    """
    columns, slashes = _call(
        "select_critical",
        vertical,
        slash,
        vertical_sizes,
        slash_sizes,
        max_vertical,
        max_slash,
        SINK_COLUMNS,
        LOCAL_DIAGONALS,
    )
    return columns, slashes


def sparse_index(
    columns: paddle.Tensor, slashes: paddle.Tensor, begin: int, rows: int, chunk_len: int, block: int = BLOCK
) -> SparseIndex:
    """What the piece [begin, begin + rows) visits, from `select_critical`'s result (spec 5.5 and 6)."""
    return SparseIndex(*_call("sparse_index", columns, slashes, begin, rows, chunk_len, block))


def dca_sparse_prefill(
    q: paddle.Tensor,
    out: paddle.Tensor,
    key_cache: paddle.Tensor,
    value_cache: paddle.Tensor,
    block_table: paddle.Tensor,
    index: SparseIndex,
    row: int,
    begin: int,
    rows: int,
    chunk_len: int,
    scale: float,
    lse: paddle.Tensor | None = None,
) -> None:
    """Dual chunk attention of one piece over the keys its index names; writes rows [row, row + rows) of out [T, H, D].

    q is [V, T, H, D]; block_table int32 [W] of the piece's sequence; lse as in `dca_prefill` (spec sections 7 and 8).
    """
    _call(
        "dca_sparse_prefill",
        q,
        out,
        key_cache,
        value_cache,
        block_table,
        *index,
        lse,
        row,
        begin,
        rows,
        chunk_len,
        scale,
    )


def sample(
    logits: paddle.Tensor,
    seen: paddle.Tensor,
    temperature: paddle.Tensor,
    top_k: paddle.Tensor,
    top_p: paddle.Tensor,
    repetition_penalty: paddle.Tensor,
    banned: paddle.Tensor,
    banned_steps: paddle.Tensor,
    seeds: paddle.Tensor,
    steps: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """One token a row of float32 logits [B, vocab]: ids int64 [B] and log-probabilities float32 [B].

    In this order: repetition penalty over `seen` (uint8 [B, vocab], the drawn token is marked in place), banned ids
    (int32 [B, E], -1 for none) while the row's step is below its `banned_steps` (int64 [B]), temperature (0 takes the
    arg-max, ties to the lower id), top_k (0 for all), top_p. The draw depends on (seed, step) alone, int64 [B] each;
    steps grow by one in place. The log-probability is that of the penalised logits before the temperature.
    """
    *_, ids, logprobs = _call(
        "sample", logits, seen, temperature, top_k, top_p, repetition_penalty, banned, banned_steps, seeds, steps
    )
    return ids, logprobs
