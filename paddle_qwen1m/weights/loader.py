"""Fills a model's parameters from a checkpoint: names and shapes are all checked before any data is read."""

from __future__ import annotations

import ctypes
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import paddle

from paddle_qwen1m.dtypes import SAFETENSORS, STORAGE, dtype_name
from paddle_qwen1m.parallel.split import COLUMNS, ROWS, Part
from paddle_qwen1m.progress import Progress

from .checkpoint import Checkpoint, check_fit
from .safetensors import DTYPE_BYTES, Array, TensorInfo
from .tensors import EMBEDDING, HEAD
from .window import read_matrix

STAGING_BYTES = 64 << 20  # what is read before it is copied to a GPU
COMPARED_BYTES = 4 << 20  # of two tensors at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where a published tensor of `shape`, or the `part` of it that this rank holds, goes: rows `row` .. of `tensor`.

    `tensor` is a contiguous parameter, float32, float16 or bfloat16; ValueError when it is not.
    """

    tensor: paddle.Tensor
    row: int
    shape: tuple[int, ...]
    part: Part | None = None

    def __post_init__(self) -> None:
        whole, held = tuple(self.tensor.shape), self.held_shape
        fits = held and held[1:] == whole[1:] and 0 <= self.row <= whole[0] - held[0]
        if not fits:
            raise ValueError(f"a tensor of shape {held} does not fit at row {self.row} of a parameter of shape {whole}")
        dtype_name(self.tensor.dtype)
        if not self.tensor.is_contiguous():
            raise ValueError(f"a parameter of shape {whole} is not contiguous: what is read into it would be lost")

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of what goes here."""
        if self.part is None:
            return self.shape
        return (*self.shape[: self.part.axis], self.part.size, *self.shape[self.part.axis + 1 :])

    def without_slicing(self) -> Slot:
        """The slot for a tensor that is already cut to the rank's part."""
        return Slot(self.tensor, self.row, self.held_shape)

    def write(self, rows: paddle.Tensor, first: int = 0) -> None:
        """Copies rows of what goes here from host memory, in the parameter's type, from its row `first` on."""
        begin = self.row + first
        self.tensor[begin : begin + rows.shape[0]].copy_(rows, True)


def load_checkpoint(
    directory: str | os.PathLike[str],
    slots: Mapping[str, Slot],
    *,
    ignore: Collection[str] = (),
    progress: bool = True,
) -> int:
    """Read every published tensor named in `slots`, or its part, from a checkpoint directory into its place.

    A directory in PaddleNLP's own form is as good: its tensors are renamed, and transposed while they stream.
    Returns the bytes that were asked of the files' data: those that the slots hold, and no others.
    Files hold float32, float16 or bfloat16; a parameter of another of the three gets the value rounded to nearest even.
    Tensors in `ignore` and rotary tables may be in the checkpoint and are skipped. A head among them is compared with
    the embedding, which is used in its place; one line in the log says when they differ. Host memory beyond the
    parameters is a few MB, for parameters on a GPU STAGING_BYTES more; nothing is written to the directory. With
    `progress`, stderr tells how far it is.
    Raises CheckpointError, before anything is read, when files, names or shapes do not fit: see Checkpoint.
    """
    checkpoint = Checkpoint(directory)
    check_fit(checkpoint.directory, checkpoint.tensors, {name: slot.shape for name, slot in slots.items()}, ignore)
    _speak_of_another_head(checkpoint, slots)
    by_file: dict[os.PathLike[str], list[str]] = defaultdict(list)
    for name in sorted(slots, key=lambda name: (checkpoint.tensors[name].file, checkpoint.tensors[name].offset)):
        by_file[checkpoint.tensors[name].file].append(name)
    asked = 0

    def count(nbytes: int) -> None:
        nonlocal asked
        asked += nbytes
        bar.update(nbytes)

    total = sum(_held_bytes(checkpoint.tensors[name], slot) for name, slot in slots.items())
    with Progress("Loading weights", total, "bytes", visible=progress) as bar:
        for path, names in by_file.items():
            with open(path, "rb", buffering=0) as file:
                for name in names:
                    _read(file, name, checkpoint.tensors[name], slots[name], count)
    return asked


def _speak_of_another_head(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    """With tied embeddings the embedding is the head, whatever else the files hold, as transformers has it too."""
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if head is None or embedding is None or HEAD in slots or EMBEDDING not in slots:
        return
    part = slots[EMBEDDING].part
    begin, end = (0, embedding.shape[0]) if part is None else (part.begin, part.end)
    if head.shape != embedding.shape or not _are_equal({HEAD: head, EMBEDDING: embedding}, begin, end):
        logger.warning(
            f"{checkpoint.directory}: tensor {HEAD!r} in {head.file.name} differs from {EMBEDDING!r} in "
            f"{embedding.file.name} and is not used, because config.json says tie_word_embeddings: set that to false "
            "if the model was trained with a head of its own"
        )


def _are_equal(tensors: Mapping[str, TensorInfo], begin: int, end: int) -> bool:
    """Whether two tensors of one shape hold the same in rows [begin, end)."""
    dtypes = {info.dtype for info in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    width = max(info.shape[1] for info in tensors.values())
    step = max(1, COMPARED_BYTES // max(1, width * STORAGE[dtype].itemsize))
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(info.file, "rb", buffering=0)) for name, info in tensors.items()}
        for first in range(begin, end, step):
            rows = first, min(first + step, end)
            one, other = (np.empty((rows[1] - rows[0]) * width, STORAGE[dtype]) for _ in tensors)
            for (name, info), block in zip(tensors.items(), (one, other)):
                read_matrix(files[name], name, info, block, dtype, rows)
            if not np.array_equal(one, other):
                return False
    return True


def _held_bytes(info: TensorInfo, slot: Slot) -> int:
    return math.prod(slot.held_shape) * DTYPE_BYTES[info.dtype]


def _read(file: io.RawIOBase, name: str, info: TensorInfo, slot: Slot, on_bytes: Callable[[int], Any]) -> None:
    """Reads a tensor where it belongs: into a parameter in host memory itself, to a GPU through a buffer."""
    held, part = slot.held_shape, slot.part
    first = part.begin if part is not None and part.axis == ROWS else 0
    columns = (part.begin, part.end) if part is not None and part.axis == COLUMNS else None
    if _is_in_host_memory(slot.tensor):
        out, dtype = _destination(slot)
        read_matrix(file, name, info, out, dtype, (first, first + held[0]), columns, on_bytes)
        return
    dtype = SAFETENSORS[dtype_name(slot.tensor.dtype)]
    width = math.prod(held[1:])
    step = max(1, STAGING_BYTES // (width * STORAGE[dtype].itemsize))
    for begin in range(0, held[0], step):
        end = min(begin + step, held[0])
        staged = np.empty((end - begin) * width, STORAGE[dtype])
        read_matrix(file, name, info, staged, dtype, (first + begin, first + end), columns, on_bytes)
        # Paddle reads uint16 as bfloat16
        slot.write(paddle.to_tensor(staged.reshape(-1, *held[1:]), place=paddle.CPUPlace()), begin)


def _is_in_host_memory(tensor: paddle.Tensor) -> bool:
    return bool(tensor.place.is_cpu_place())


def _destination(slot: Slot) -> tuple[Array, str]:
    """The slot's memory as a flat writable array, and its dtype."""
    dtype = SAFETENSORS[dtype_name(slot.tensor.dtype)]
    count, width = math.prod(slot.held_shape), math.prod(slot.held_shape[1:])
    address = slot.tensor.data_ptr() + slot.row * width * STORAGE[dtype].itemsize
    memory: Any = (ctypes.c_char * (count * STORAGE[dtype].itemsize)).from_address(address)
    return np.frombuffer(memory, STORAGE[dtype]), dtype
