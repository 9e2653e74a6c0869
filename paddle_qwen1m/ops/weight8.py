"""Linear layers whose weights are bytes with scales, rows in FP8 beside them, and how weights become such bytes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
import paddle

from paddle_qwen1m.ops.library import call, library

FEW_ROWS = 64
"""Up to so many rows a linear layer on a GPU reads the bytes, for every 16 rows once; above, a GEMM reads them widened
to 16 bits, which takes five times the traffic.
"""
KINDS = {"int8": 3, "fp8": 4}
"""By name, as qwen1m_dtype has them."""
DTYPES = {"F32": 0, "BF16": 1, "F16": 2}


class Weight8(NamedTuple):
    """A weight [N, K] as numbers of 8 bits with scales: numbers[n, k] * scales[n // rows, k // columns].

    numbers: uint8 [N, K], the bytes of int8 or of FP8 (E4M3) numbers, as `kind` says. scales: float32
    [N / rows, K / columns]; a block has 1 to 128 rows and 16 to 128 columns, powers of two.
    """

    numbers: paddle.Tensor
    scales: paddle.Tensor
    kind: str

    def widened(self, dtype: str) -> paddle.Tensor:
        """`widen_weight`."""
        return widen_weight(self, dtype)

    def widened_for(self, x: paddle.Tensor) -> paddle.Tensor:
        """In the type of activations of 16 bits."""
        return self.widened("bfloat16" if x.dtype == paddle.bfloat16 else "float16")


class WidenedOnce(Weight8):
    """The same for several products, which share what the first of them has widened, all to one type."""

    _widened: paddle.Tensor | None = None

    def widened(self, dtype: str) -> paddle.Tensor:
        if self._widened is None:
            self._widened = super().widened(dtype)
        return self._widened


def reads_bytes(x: paddle.Tensor) -> bool:
    """Whether rows [T, K] are multiplied by the bytes themselves."""
    return x.shape[0] <= FEW_ROWS or not x.place.is_gpu_place()


def linear8(x: paddle.Tensor, weight: Weight8) -> paddle.Tensor:
    """x [T, K] times the transpose of the weight: activations [T, N]. What is computed in is `x`'s type."""
    return call("linear8", x, *weight)[0]


def widen_weight(weight: Weight8, dtype: str) -> paddle.Tensor:
    """What the weight stands for, as "float32", "bfloat16" or "float16" [N, K], rounded to nearest even."""
    return call("widen_weight", *weight, dtype)[0]


class Rows8(NamedTuple):
    """Activations [T, K] in FP8 (E4M3) with scales: numbers[t, k] * scales[k // 128, t].

    numbers: uint8 [R, K], scales: float32 [K / 128, R], R being `tokens`, T, up to a multiple of 4; the rows behind T
    are zeros. K is a multiple of 128.
    """

    numbers: paddle.Tensor
    scales: paddle.Tensor
    tokens: int


def round_rows(values: paddle.Tensor) -> Rows8:
    """Activations [T, K] in FP8."""
    return _rows(call("round_rows", values), values)


def rms_norm8(hidden: paddle.Tensor, weight: paddle.Tensor, eps: float) -> Rows8:
    """`rms_norm` of float32 [T, K], rounded to FP8 in place of the activations' type."""
    return _rows(call("rms_norm8", hidden, weight, eps), hidden)


def add_rms_norm8(delta: paddle.Tensor, residual: paddle.Tensor, weight: paddle.Tensor, eps: float) -> Rows8:
    """The same of `add_rms_norm`, which adds `delta` [T, K] to `residual` in place."""
    return _rows(call("add_rms_norm8", delta, residual, weight, eps)[1:], residual)


def _rows(made: list[paddle.Tensor], of: paddle.Tensor) -> Rows8:
    numbers, scales = made
    return Rows8(numbers, scales, of.shape[0])


def product8(x: Rows8 | list[Rows8], weight: Weight8, dtype: str) -> paddle.Tensor:
    """x [T, K] times the transpose of an FP8 weight in blocks of 128 x 128: [T, N] as `dtype`, on a CPU float32.

    Several are rows one below the other, each but the last a multiple of 4. A GPU that `multiplies_rows8` is needed.
    """
    parts = [x] if isinstance(x, Rows8) else x
    heights, tokens = [part.numbers.shape[0] for part in parts], sum(part.tokens for part in parts)
    assert tokens > sum(heights) - 4 and heights[:-1] == [part.tokens for part in parts[:-1]]
    on_gpu = weight.numbers.place.is_gpu_place()
    y = paddle.empty([sum(heights), weight.numbers.shape[0]], dtype if on_gpu else "float32")
    end = 0
    for part, height in zip(parts, heights):
        end += height
        own = y if len(parts) == 1 else y[end - height : end]
        call("product8", part.numbers, part.scales, weight.numbers, weight.scales, own)
    return y if tokens == y.shape[0] else y[:tokens]


def gated_product8(x: Rows8, weight: Weight8) -> Rows8:
    """`silu_mul` of x [T, K] times the transpose of such a weight, of gate and up [2N, K]: in FP8 [T, N]. On a GPU the
    product itself is never in memory.
    """
    numbers, scales = call("gated_product8", x.numbers, x.scales, weight.numbers, weight.scales)
    return Rows8(numbers, scales, x.tokens)


def multiplies_rows8() -> bool:
    """Whether Paddle's GPU multiplies rows in FP8: a Hopper does."""
    return bool(library().qwen1m_cuda_multiplies_rows8())


class _Weight8(ctypes.Structure):
    """See custom_ops/include/qwen1m/weight8.h."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("kind", "rows", "columns")),
    )


class _RoundWeight(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("weight", _Weight8),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features")),
        ("dtype", ctypes.c_int32),
    )


def round_weight(values: np.ndarray, dtype: str, kind: str, numbers: np.ndarray, scales: np.ndarray) -> bool:
    """Rounds `values` [N, K], in the storage of `dtype` (F32, BF16 or F16), to 8 bits of `kind`, ties to even.

    numbers uint8 [N, K] and scales float32 [N / rows, K / columns], which are written, say what a block is. All are
    contiguous and in host memory. Returns False where a value is not finite, and nothing that was written has a
    meaning. Other threads of Python run meanwhile.
    """
    features, depth = values.shape
    assert numbers.shape == values.shape and numbers.dtype == np.uint8 and scales.dtype == np.float32
    assert values.flags.c_contiguous and numbers.flags.c_contiguous and scales.flags.c_contiguous
    if not values.size:
        return True
    blocks = features // scales.shape[0], depth // scales.shape[1]
    assert blocks[0] * scales.shape[0] == features and blocks[1] * scales.shape[1] == depth
    weight = _Weight8(numbers.ctypes.data, scales.ctypes.data, KINDS[kind], *blocks)
    return not _rounding()(ctypes.byref(_RoundWeight(values.ctypes.data, weight, depth, features, DTYPES[dtype])))


@functools.cache
def _rounding() -> Any:
    function = library().qwen1m_cpu_round_weight
    function.argtypes, function.restype = (ctypes.POINTER(_RoundWeight),), ctypes.c_int
    return function
