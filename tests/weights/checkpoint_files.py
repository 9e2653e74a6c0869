"""Writes safetensors files byte by byte, so that the tests can also write wrong ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {np.dtype("f4"): "F32", np.dtype("f2"): "F16", np.dtype("u2"): "BF16"}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    return header


def write_raw(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """uint16 arrays are written as bfloat16."""
    write_raw(path, header_of(tensors), b"".join(array.tobytes() for array in tensors.values()))


def write_sharded(directory: Path, shards: Sequence[Mapping[str, np.ndarray]]) -> Path:
    """Shards and their index in the published naming; returns the index."""
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    index = directory / "model.safetensors.index.json"
    total = sum(array.nbytes for tensors in shards for array in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return index
