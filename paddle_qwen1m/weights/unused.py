"""Tensors that a checkpoint holds and the model does not need, compared with what is used in their place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from paddle_qwen1m.dtypes import STORAGE

from .checkpoint import Checkpoint
from .names import DERIVED_SUFFIX
from .safetensors import Array, CheckpointError, TensorInfo
from .tensors import EMBEDDING, HEAD
from .window import read_matrix

if TYPE_CHECKING:
    from paddle_qwen1m.config import ModelConfig

BLOCK_ELEMENTS = 1 << 20
ANGLE_TOLERANCE = 1e-2  # frequencies kept in bfloat16 are rounded by up to 4e-3


def compare_unused(directory: str | os.PathLike[str], config: ModelConfig) -> list[str]:
    """What to tell the user of rotary tables in the files: a line where they are of another base than config.json's.

    Raises CheckpointError, naming the file, for an lm_head.weight that tie_word_embeddings says is not needed and that
    is not the embedding. Reads both, and nothing where there are no such tensors.
    """
    checkpoint = Checkpoint(directory)
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if config.tie_word_embeddings and head is not None and embedding is not None and not _are_equal(head, embedding):
        raise CheckpointError(
            f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings true, "
            "which uses the embedding in its place: set it to false where this head was trained, or remove the tensor"
        )
    return [
        f"{info.file}: {name} is not of config.json's rotary base {config.rope_theta:,.0f}, which counts"
        for name, info in checkpoint.tensors.items()
        if name.endswith(DERIVED_SUFFIX) and not _is_of_base(name, info, config)
    ]


def _are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, BLOCK_ELEMENTS // one.shape[1])
    for begin in range(0, one.shape[0], step):
        rows = begin, min(begin + step, one.shape[0])
        if not np.array_equal(_rows(HEAD, one, rows), _rows(EMBEDDING, other, rows), equal_nan=True):
            return False
    return True


def _is_of_base(name: str, info: TensorInfo, config: ModelConfig) -> bool:
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if info.dtype not in STORAGE or info.shape != frequencies.shape:
        return False
    return np.allclose(_rows(name, info, (0, info.shape[0])), frequencies, rtol=ANGLE_TOLERANCE, atol=0)


def _rows(name: str, info: TensorInfo, rows: tuple[int, int]) -> Array:
    width = info.shape[1] if len(info.shape) > 1 else 1
    out = np.empty((rows[1] - rows[0]) * width, np.float32)
    with open(info.file, "rb", buffering=0) as file:
        read_matrix(file, name, info, out, "F32", rows)
    return out
