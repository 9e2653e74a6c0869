"""Data types: every spelling leads to one name, everything else is refused with the three that work."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from paddle_qwen1m.dtypes import DTYPES, SAFETENSORS, STORAGE, dtype_name, itemsize


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_has_one_name_and_one_size(name: str) -> None:
    assert dtype_name(name) == dtype_name(f"torch.{name}") == dtype_name(getattr(paddle, name)) == name
    size = paddle.zeros([1], name).element_size()
    assert itemsize(name) == STORAGE[SAFETENSORS[name]].itemsize == size


@pytest.mark.parametrize("other", ["int8", "float8_e4m3fn", paddle.int64, np.float64, None, ""])
def test_another_type_is_refused(other: Any) -> None:
    for function in (dtype_name, itemsize):
        with pytest.raises(ValueError, match="one of float32, bfloat16, float16, got"):
            function(other)
