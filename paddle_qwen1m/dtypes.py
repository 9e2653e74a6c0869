"""The data types of weights, activations and caches: their names, sizes and spellings elsewhere, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    """`name`: in Paddle, PyTorch and config.json. `storage`: what numpy holds it in, bfloat16 as its bits."""

    name: str
    safetensors: str
    storage: np.dtype[Any]


TABLE = (
    DType("float32", "F32", np.dtype("<f4")),
    DType("bfloat16", "BF16", np.dtype("<u2")),
    DType("float16", "F16", np.dtype("<f2")),
)
DTYPES = tuple(dtype.name for dtype in TABLE)
SAFETENSORS = {dtype.name: dtype.safetensors for dtype in TABLE}
"""The spelling in a safetensors header of a name."""
STORAGE = {dtype.safetensors: dtype.storage for dtype in TABLE}
"""numpy's type of a spelling in a safetensors header."""
INT8, FP8 = "int8", "fp8"
"""Of weights, and of keys and values, with scales beside them. FP8 is E4M3: 4 bits of exponent, 3 of mantissa."""
QUANTIZATIONS = (FP8, INT8)
"""What is kept in 8 bits."""
CACHE_DTYPES = (*DTYPES, INT8, FP8)
_SIZES = {dtype.name: dtype.storage.itemsize for dtype in TABLE}


def dtype_name(dtype: Any, option: str = "dtype", allowed: Sequence[str] = DTYPES) -> str:
    """The name of a type that is text or Paddle's or PyTorch's object. ValueError, naming the option, for any other."""
    name = str(dtype).rsplit(".", 1)[-1]
    if name not in allowed:
        given = repr(dtype) if isinstance(dtype, str) else dtype  # Paddle's repr of one is an enumerator's
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {given}")
    return name


def itemsize(dtype: str) -> int:
    """Bytes of one value; ValueError when weights are never of that dtype."""
    return _SIZES[dtype_name(dtype)]
