"""Rotary tables that a checkpoint holds and the model does not need, compared with those that are used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from paddle_qwen1m.dtypes import STORAGE

from .checkpoint import Checkpoint
from .names import DERIVED_SUFFIX
from .safetensors import TensorInfo
from .window import read_matrix

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

ANGLE_TOLERANCE = 1e-2  # frequencies kept in bfloat16 are rounded by up to 4e-3


def compare_rotary_tables(directory: str | os.PathLike[str], config: ModelConfig) -> list[str]:
    """What to tell the user of rotary tables in the files: a line where they are of another base than config.json's."""
    return [
        f"{info.file}: {name} is not of config.json's rotary base {config.rope_theta:,.0f}, which counts"
        for name, info in Checkpoint(directory).tensors.items()
        if name.endswith(DERIVED_SUFFIX) and not _is_of_base(name, info, config)
    ]


def _is_of_base(name: str, info: TensorInfo, config: ModelConfig) -> bool:
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if info.dtype not in STORAGE or info.shape != frequencies.shape:
        return False
    found = np.empty(info.shape[0], np.float32)
    with open(info.file, "rb", buffering=0) as file:
        read_matrix(file, name, info, found.reshape(-1, 1), "F32", (0, info.shape[0]))
    return np.allclose(found, frequencies, rtol=ANGLE_TOLERANCE, atol=0)
