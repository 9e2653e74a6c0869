"""The data of a conversion: panels of the source's tensors go to the files of the plan, and are read back to verify."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np

from paddle_qwen1m.dtypes import STORAGE
from paddle_qwen1m.fileio.durable import publish, temporary
from paddle_qwen1m.fileio.readahead import ReadAheadFile
from paddle_qwen1m.parallel.split import ROWS, Part
from paddle_qwen1m.progress import Progress

from .conversion import Group, Plan, Target
from .eight_bit import FILE_BLOCKS, FILE_KINDS, LARGEST_BLOCK, read_scales, round_tensor, widen
from .record import Record
from .safetensors import BYTES, Array, cast, read_rows
from .source import Tensor
from .window import as_matrix, read_window
from .writer import Buffers, OutputFile, Piece, Writer

# Bytes of a tensor that are read and written at once, and how many of these are in memory; where the file and what is
# written are transposed to one another, every panel is a pass over the tensor, hence large ones.
PANEL_BYTES, PANELS = 1 << 20, 16
TRANSPOSED_PANEL_BYTES, TRANSPOSED_PANELS = 160 << 20, 3


def write_shards(plan: Plan, destination: Path, record: Record, progress: bool) -> None:
    """Writes the files of weights that are not in the record, each under a temporary name until it is whole.

    A file is in the record once it is synced, and only then gets its name.
    """

    def publish_file(file: OutputFile) -> None:
        name = file.path.relative_to(destination).as_posix()
        record.files[name] = {"bytes": file.nbytes, "sha256": file.sha256.hexdigest()}
        try:
            record.write(destination)
            publish(file.path)
        except OSError:
            if temporary(file.path).exists():
                del record.files[name]
                with suppress(OSError):
                    record.write(destination)
            raise

    total = sum(target.nbytes for target in plan.targets if target.file not in record.files)
    with Writer(publish_file) as writer, Progress("Converting", total, "bytes", visible=progress) as bar:
        memory = Buffers(PANELS), Buffers(TRANSPOSED_PANELS)
        for group in plan.groups:
            targets = [target for target in group.targets if target.file not in record.files]
            if targets:
                _write_group(group, targets, destination, writer, memory, bar)


def _write_group(
    group: Group,
    targets: list[Target],
    destination: Path,
    writer: Writer,
    memory: tuple[Buffers, Buffers],
    bar: Progress,
) -> None:
    files = [writer.open(destination / target.file) for target in targets]

    def put(file: OutputFile, data: memoryview) -> Piece:
        bar.update(len(data))
        return writer.put(file, data)

    for file, target in zip(files, targets):
        put(file, memoryview(target.header))
    with ExitStack() as stack:
        opened: dict[Path, io.RawIOBase] = {}

        def open_file(path: Path) -> io.RawIOBase:
            if path not in opened:
                opened[path] = stack.enter_context(ReadAheadFile(path))
            return opened[path]

        for number in range(len(group.tensors)):
            for first, panel, buffers in _panels(group, number, open_file, memory):
                last = None
                for file, target in zip(files, targets):
                    for part in _cut(panel, first, target.parts[number]):
                        if part.size:
                            last = put(file, part.reshape(-1).view(np.uint8).data)
                if buffers is not None:
                    buffers.give_back(last)
    for file in files:
        writer.finish(file)


def _panels(
    group: Group, number: int, open_file: Callable[[Path], io.RawIOBase], memory: tuple[Buffers, Buffers]
) -> Iterator[tuple[int, Array, Buffers | None]]:
    """A tensor as it is written, in ranges of rows, each with its first row and the ring its memory is of, if any."""
    if group.kinds[number] is not None:
        yield from _rounded_panels(group, number, open_file, memory[0])
        return
    tensor, dtype = group.tensors[number], STORAGE[group.dtypes[number]]
    pieces = tensor.pieces
    rows, width = as_matrix(tensor.shape)
    if group.flipped[number]:
        pieces = tuple(piece.flipped() for piece in pieces)
        rows, width = width, rows
    transposed = any(piece.info.transposed for piece in pieces)
    step = max(1, (TRANSPOSED_PANEL_BYTES if transposed else PANEL_BYTES) // max(1, width * dtype.itemsize))
    for first in range(0, rows, step):
        panel = memory[transposed].take((min(step, rows - first), width), dtype)
        if tensor.scales is None:
            read_window(open_file, pieces, first, panel, group.dtypes[number])
        else:
            _read_widened(open_file, tensor, first, panel, group.dtypes[number])
        yield first, panel, memory[transposed]


def _rounded_panels(
    group: Group, number: int, open_file: Callable[[Path], io.RawIOBase], memory: Buffers
) -> Iterator[tuple[int, Array, Buffers | None]]:
    """The numbers of a tensor that becomes 8 bits, in ranges of rows of whole blocks, and then all scales."""
    tensor, dtype, kind = group.tensors[number], group.dtypes[number], group.kinds[number]
    assert kind is not None
    (rows, width), blocks = as_matrix(tensor.shape), FILE_BLOCKS[kind]
    scales = np.empty(blocks.grid((rows, width)), np.float32)
    transposed = any(piece.info.transposed for piece in tensor.pieces)
    most = (TRANSPOSED_PANEL_BYTES if transposed else PANEL_BYTES) // (width * STORAGE[dtype].itemsize)
    step = max(1, most // LARGEST_BLOCK) * LARGEST_BLOCK
    panel = np.empty((min(step, rows), width), STORAGE[dtype])
    for first in range(0, rows, step):
        values = panel[: min(step, rows - first)]
        read_window(open_file, tensor.pieces, first, values, dtype)
        numbers = memory.take((len(values), width), np.dtype(np.uint8))
        own = scales[first // blocks.rows :][: len(values) // blocks.rows]
        round_tensor(values, dtype, kind, numbers, own, f"{tensor.file}: tensor {tensor.name!r}")
        yield first, numbers, memory
    yield 0, scales, None


def _read_widened(
    open_file: Callable[[Path], io.RawIOBase], tensor: Tensor, first: int, panel: Array, dtype: str
) -> None:
    """Fills rows of a tensor of 8 bits from `first` on with what the numbers stand for."""
    assert tensor.scales is not None
    kind, last = FILE_KINDS[tensor.dtype], first + len(panel)
    (piece,) = tensor.pieces
    numbers = np.empty(panel.shape, np.uint8)
    source = replace(piece.info, dtype=BYTES)
    read_rows(open_file(source.file), tensor.name, source, numbers.reshape(-1), BYTES, (first, last))
    columns = np.arange(0, panel.shape[1], LARGEST_BLOCK)
    scales = read_scales(open_file, tensor.name, tensor.scales, kind, np.arange(first, last), columns)
    wide = widen(kind, numbers, scales)
    cast(wide.reshape(-1), "F32", panel.reshape(-1), dtype, f"{source.file}: tensor {tensor.name!r}")


def _cut(panel: Array, first: int, part: Part | None) -> list[Array]:
    """What a target holds of a panel whose first row is the tensor's row `first`, in the order of its file."""
    if part is None:
        return [panel]
    if part.axis == ROWS:
        return [panel[max(0, begin - first) : max(0, end - first)] for begin, end in part.ranges]
    return [np.concatenate([panel[:, begin:end] for begin, end in part.ranges], axis=1)]


def differing_shards(plan: Plan, destination: Path, record: Record, progress: bool) -> list[str]:
    """Reads every file of weights again; names those whose size, header or SHA-256 are not what was written."""
    wrong = []
    total = sum(target.nbytes for target in plan.targets)
    with Progress("Verifying", total, "bytes", visible=progress) as bar:
        for target in plan.targets:
            path = destination / target.file
            if not _is_as_written(path, target, record.files[target.file], bar):
                wrong.append(target.file)
    return wrong


def _is_as_written(path: Path, target: Target, entry: dict[str, object], bar: Progress) -> bool:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PANEL_BYTES))
    with ReadAheadFile(path) as file:
        # what is on the disk, not what is still in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(target.header)) != target.header:
            return False
        digest.update(target.header)
        nbytes = len(target.header)
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            bar.update(got)
            nbytes += got
    return nbytes == target.nbytes == entry["bytes"] and digest.hexdigest() == entry["sha256"]
