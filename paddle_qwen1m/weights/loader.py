"""Fills a model's parameters from a checkpoint: names and shapes are all checked before any data is read."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle

from paddle_qwen1m import ops
from paddle_qwen1m.dtypes import SAFETENSORS, STORAGE, dtype_name
from paddle_qwen1m.fileio.rows import RowFile
from paddle_qwen1m.fileio.staging import Staging
from paddle_qwen1m.parallel.split import COLUMNS, ROWS, Part

from .bar import LoadingBar
from .checkpoint import Checkpoint, check_fit
from .eight_bit import FILE_KINDS, SCALES, Blocks, read_scales, round_tensor
from .safetensors import BYTES, DTYPE_BYTES, READ, Array, CheckpointError, TensorInfo
from .tensors import EMBEDDING, HEAD
from .window import read_matrix

READERS = 8  # threads that read
UNIT_BYTES = 32 << 20  # of a parameter, read by one of them in one go
BUFFERS = 2  # of so many bytes that a reader has, where it reads for a GPU: one is filled while the other is copied
AHEAD = 8  # units that the kernel is asked for before a reader takes them
COMPARED_BYTES = 4 << 20  # of two tensors at once
SCALE_BYTES = 4
ALIGNMENT = 16  # of what lies in one buffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """Where a published tensor of `shape`, or the `part` of it that this rank holds, goes: rows `row` .. of `tensor`.

    `tensor` is a contiguous parameter, float32, float16 or bfloat16; ValueError when it is not. With `weight8` it is
    that weight's numbers, and what goes here is rounded to them and their scales, or has been in the files.
    """

    tensor: paddle.Tensor
    row: int
    shape: tuple[int, ...]
    part: Part | None = None
    weight8: ops.Weight8 | None = None

    def __post_init__(self) -> None:
        whole, held = tuple(self.tensor.shape), self.held_shape
        fits = held and held[1:] == whole[1:] and 0 <= self.row <= whole[0] - held[0]
        if not fits:
            raise ValueError(f"a tensor of shape {held} does not fit at row {self.row} of a parameter of shape {whole}")
        if self.weight8 is None:
            dtype_name(self.tensor.dtype)
        elif self.row % self.blocks.rows or held[0] % self.blocks.rows:
            raise ValueError(f"rows {self.row} to {self.row + held[0]} are no whole blocks of {self.blocks.rows} rows")
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
        return Slot(self.tensor, self.row, self.held_shape, weight8=self.weight8)

    @property
    def dtype(self) -> str:
        """How safetensors spells the parameter's type; of numbers of 8 bits BYTES."""
        return SAFETENSORS[dtype_name(self.tensor.dtype)] if self.weight8 is None else BYTES

    @property
    def blocks(self) -> Blocks:
        """The values of the parameter that share a scale."""
        assert self.weight8 is not None
        (height, width), (down, across) = self.tensor.shape, self.weight8.scales.shape
        return Blocks(height // down, width // across)

    def address(self, row: int) -> int:
        """Of the first byte of that row of what goes here, on the parameter's device."""
        width = math.prod(self.held_shape[1:])
        return int(self.tensor.data_ptr()) + (self.row + row) * width * READ[self.dtype].itemsize

    def scales_address(self, row: int) -> int:
        """Of the first scale of that row, of whole blocks."""
        assert self.weight8 is not None
        scales = self.weight8.scales
        return int(scales.data_ptr()) + (self.row + row) // self.blocks.rows * int(scales.shape[1]) * SCALE_BYTES

    def write(self, values: Array) -> None:
        """Copies what goes here, float32 or bfloat16 as its bits, in the parameter's type, or rounded to numbers and
        scales.
        """
        host = paddle.CPUPlace()
        if self.weight8 is None:
            held = paddle.to_tensor(values, place=host).astype(self.tensor.dtype)
            self.tensor[self.row : self.row + len(values)].copy_(held, True)
            return
        numbers, scales = np.empty(values.shape, np.uint8), np.empty(self.blocks.grid(values.shape), np.float32)
        spelled = "BF16" if values.dtype == np.uint16 else "F32"
        assert ops.round_weight(np.ascontiguousarray(values), spelled, self.weight8.kind, numbers, scales)
        first = self.row // self.blocks.rows
        self.tensor[self.row : self.row + len(values)].copy_(paddle.to_tensor(numbers, place=host), True)
        self.weight8.scales[first : first + len(scales)].copy_(paddle.to_tensor(scales, place=host), True)


@dataclass(frozen=True)
class _Unit:
    """Rows [begin, end) of what goes to a slot: what a reader reads in one go. row: of the published tensor, the first
    of them; scales: those that files have.
    """

    name: str
    info: TensorInfo
    slot: Slot
    begin: int
    end: int
    row: int
    scales: TensorInfo | None = None

    @property
    def count(self) -> int:
        return (self.end - self.begin) * math.prod(self.slot.held_shape[1:])

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Address and length of what is written: values, or numbers and their scales."""
        pieces = [(self.slot.address(self.begin), self.count * READ[self.slot.dtype].itemsize)]
        if self.slot.weight8 is not None:
            scales = math.prod(self.slot.blocks.grid((self.end - self.begin, self.slot.held_shape[1])))
            pieces.append((self.slot.scales_address(self.begin), scales * SCALE_BYTES))
        return pieces

    @property
    def nbytes(self) -> int:
        """Of a buffer for all pieces, each at a multiple of ALIGNMENT."""
        return sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for _, nbytes in self.pieces)

    @property
    def rows(self) -> tuple[int, int]:
        """Of the published tensor."""
        return self.row, self.row + self.end - self.begin

    @property
    def columns(self) -> Sequence[tuple[int, int]] | None:
        """Of the published tensor; None for all."""
        part = self.slot.part
        return part.ranges if part is not None and part.axis == COLUMNS else None

    @property
    def bytes_in_file(self) -> tuple[int, int]:
        """From where to where they lie there, others among them."""
        info = self.info
        begin, end = (0, info.shape[0]) if info.transposed else self.rows
        row_bytes = info.nbytes // max(1, info.shape[0])
        return info.offset + begin * row_bytes, info.offset + end * row_bytes

    def read(
        self, open_file: Callable[[Path], RowFile], staging: Staging | None, on_bytes: Callable[[int], Any]
    ) -> None:
        """From the files to where they belong, on a GPU through a buffer whose copy is then under way."""
        if _is_in_host_memory(self.slot.tensor):
            self._fill([_memory(address, nbytes) for address, nbytes in self.pieces], open_file, on_bytes)
            return
        assert staging is not None
        buffer, memories, offset = staging.next(), [], 0
        for _, nbytes in self.pieces:
            memories.append(buffer.memory[offset : offset + nbytes])
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._fill(memories, open_file, on_bytes)
        offset = 0
        for address, nbytes in self.pieces:
            buffer.scatter(np.array([address]), nbytes, offset)
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def _fill(
        self, memories: Sequence[Array], open_file: Callable[[Path], RowFile], on_bytes: Callable[[int], Any]
    ) -> None:
        """Reads into host memory, uint8 [nbytes] of each piece."""
        slot, file = self.slot, open_file(self.info.file)
        if slot.weight8 is None:
            out = memories[0].view(STORAGE[slot.dtype]).reshape(self.end - self.begin, -1)
            read_matrix(file, self.name, self.info, out, slot.dtype, self.rows, self.columns, on_bytes)
            return
        shape = self.end - self.begin, slot.held_shape[1]
        numbers, scales = memories[0].reshape(shape), memories[1].view(np.float32).reshape(slot.blocks.grid(shape))
        if self.scales is not None:
            info = replace(self.info, dtype=BYTES)
            read_matrix(file, self.name, info, numbers, BYTES, self.rows, self.columns, on_bytes)
            blocks, ranges = slot.blocks, self.columns or [(0, shape[1])]
            rows = np.arange(*self.rows, blocks.rows)
            columns = np.concatenate([np.arange(*part, blocks.columns) for part in ranges])
            scales[:] = read_scales(open_file, self.name, self.scales, slot.weight8.kind, rows, columns)
            return
        values = np.empty(shape, STORAGE[self.info.dtype])
        read_matrix(file, self.name, self.info, values, self.info.dtype, self.rows, self.columns, on_bytes)
        source = f"{self.info.file}: tensor {self.name!r}"
        round_tensor(values, self.info.dtype, slot.weight8.kind, numbers, scales, source)


def load_checkpoint(
    directory: str | os.PathLike[str],
    slots: Mapping[str, Slot],
    *,
    ignore: Collection[str] = (),
    bar: LoadingBar | None = None,
) -> int:
    """Read every published tensor named in `slots`, or its part, from a checkpoint directory into its place.

    A directory in PaddleNLP's own form is as good: its tensors are renamed, and transposed while they stream.
    Returns the bytes that were asked of the files' data: those that the slots hold, and no others.
    Files hold float32, float16 or bfloat16; a parameter of another of the three gets the value rounded to nearest even,
    one of 8 bits numbers and scales. These may lie in the files already, for parameters of the same kind alone.
    Tensors in `ignore` and rotary tables may be in the checkpoint and are skipped. A head among them is compared with
    the embedding, which is used in its place; one line in the log says when they differ. Host memory beyond the
    parameters is a few MB a reader, for parameters on a GPU its buffers more; nothing is written to the directory.
    `bar` is told how far it is.
    Raises CheckpointError, before anything is read, when files, names or shapes do not fit: see Checkpoint.
    """
    checkpoint = Checkpoint(directory)
    check_fit(checkpoint.directory, checkpoint.tensors, {name: slot.shape for name, slot in slots.items()}, ignore)
    _check_kinds(checkpoint, slots)
    _speak_of_another_head(checkpoint, slots)
    tensors = checkpoint.tensors
    by_place = sorted(slots, key=lambda name: (tensors[name].file, tensors[name].offset))
    units = [
        unit for name in by_place for unit in _units(name, tensors[name], slots[name], tensors.get(f"{name}{SCALES}"))
    ]
    total = sum(_held_bytes(checkpoint.tensors[name], slot) for name, slot in slots.items())
    if bar is not None:
        bar.expect(total)
    return _Loading(units, (lambda _: None) if bar is None else bar.update).run()


def _check_kinds(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    """CheckpointError where files hold numbers of 8 bits that the parameters are not of."""
    for name, slot in slots.items():
        info = checkpoint.tensors[name]
        kind = FILE_KINDS.get(info.dtype)
        if kind is not None and (slot.weight8 is None or slot.weight8.kind != kind):
            wanted = "16 or 32 bits" if slot.weight8 is None else slot.weight8.kind
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {kind}, and is to be kept in {wanted}: load it with "
                f"quantization={kind!r}, or the checkpoint that it was made from, or convert it back: "
                "`paddle-qwen1m convert SRC DST --format huggingface --quantization none`"
            )


def _speak_of_another_head(checkpoint: Checkpoint, slots: Mapping[str, Slot]) -> None:
    """With tied embeddings the embedding is the head, whatever else the files hold, as transformers has it too."""
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if head is None or embedding is None or HEAD in slots or EMBEDDING not in slots:
        return
    part = slots[EMBEDDING].part
    begin, end = (0, embedding.shape[0]) if part is None else part.ranges[0]
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
                read_matrix(files[name], name, info, block.reshape(-1, width), dtype, rows)
            if not np.array_equal(one, other):
                return False
    return True


def _held_bytes(info: TensorInfo, slot: Slot) -> int:
    return math.prod(slot.held_shape) * DTYPE_BYTES[info.dtype]


def _units(name: str, info: TensorInfo, slot: Slot, scales: TensorInfo | None) -> Iterator[_Unit]:
    """A tensor in parts for readers. In host memory one that lies transposed is one: each part is a pass over it."""
    height, row_bytes = slot.held_shape[0], math.prod(slot.held_shape[1:]) * READ[slot.dtype].itemsize
    step = max(1, UNIT_BYTES // max(1, row_bytes))
    if slot.weight8 is not None:
        step = max(1, step // slot.blocks.rows) * slot.blocks.rows
    if info.transposed and _is_in_host_memory(slot.tensor):
        step = height
    part, at = slot.part, 0
    for first, last in part.ranges if part is not None and part.axis == ROWS else [(0, height)]:
        for row in range(first, last, max(1, step)):
            end = min(row + step, last)
            yield _Unit(name, info, slot, at + row - first, at + end - first, row, scales)
        at += last - first


class _Loading:
    """Threads that take units one after the other and read them where they belong."""

    def __init__(self, units: Sequence[_Unit], on_bytes: Callable[[int], Any]) -> None:
        self._units, self._on_bytes = units, on_bytes
        self._taken = self._asked = 0
        self._is_over = False
        self._lock = threading.Lock()

    def run(self) -> int:
        """Returns, when all is where it belongs, the bytes that were asked of files. Raises what a reader raises."""
        staged = [unit for unit in self._units if not _is_in_host_memory(unit.slot.tensor)]
        readers = min(READERS, len(os.sched_getaffinity(0)), len(self._units))
        stagings: list[Staging | None] = [None] * readers
        if staged:
            size, on_gpu = max(unit.nbytes for unit in staged), staged[0].slot.tensor.place.is_gpu_place()
            stagings = [Staging(size, gpu=on_gpu, buffers=BUFFERS) for _ in stagings]
            # Copies run on a stream of their own: what had the parameters' memory before is to be done with it.
            ops.Post([ops.tensor(np.zeros(1, np.float32))]).wait()
        with ThreadPoolExecutor(max(1, readers), "load weights") as pool:
            try:
                for reader in as_completed([pool.submit(self._read, staging) for staging in stagings]):
                    reader.result()
            finally:
                self._is_over = True
        return self._asked

    def _read(self, staging: Staging | None) -> None:
        """A reader's life."""
        with ExitStack() as stack:
            if staging is not None:
                stack.callback(staging.wait)
            files: dict[Path, RowFile] = {}

            def open_file(path: Path) -> RowFile:
                if path not in files:
                    files[path] = stack.enter_context(RowFile(path))
                return files[path]

            while (number := self._take()) is not None:
                for ahead in self._units[number + AHEAD : number + AHEAD + 1]:
                    open_file(ahead.info.file).fetch(*ahead.bytes_in_file)
                unit = self._units[number]
                unit.read(open_file, staging, self._count)

    def _take(self) -> int | None:
        with self._lock:
            if self._is_over or self._taken == len(self._units):
                return None
            self._taken += 1
            return self._taken - 1

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._asked += nbytes
            self._on_bytes(nbytes)


def _is_in_host_memory(tensor: paddle.Tensor) -> bool:
    return bool(tensor.place.is_cpu_place())


def _memory(address: int, nbytes: int) -> Array:
    """Bytes of host memory as a flat writable array."""
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    return np.frombuffer(memory, np.uint8)
