"""Reads safetensors files: checks a header completely, then streams tensors straight into memory the caller owns.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data without
holes (https://huggingface.co/docs/safetensors). bfloat16 is handled as its bits in numpy's uint16.
"""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import numpy.typing as npt

from paddle_qwen1m.dtypes import STORAGE
from paddle_qwen1m.fileio.rows import RowFile

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "U32": 4, "I32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
    **{name: storage.itemsize for name, storage in STORAGE.items()},
}  # fmt: skip
Array = npt.NDArray[Any]
MAX_HEADER_BYTES = 100_000_000
TILE_ELEMENTS = 1 << 20
FLOAT16_MAX = 65504.0
BYTES = "U8"
"""In place of a type: bytes as they lie there."""
READ = {**STORAGE, BYTES: np.dtype(np.uint8)}


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file and the tensor, and says what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of `file`, row-major.

    `transposed`: the file holds the transposed matrix of the one that `shape` describes; see window.read_matrix.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def flipped(self) -> TensorInfo:
        """The same bytes as the transposed matrix."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file by name, in the order of their data.

    Raises CheckpointError when the file is missing, truncated or not safetensors, or when its header contradicts itself
    or the file's size.
    """
    raw, size = _read_raw_header(path)
    length = len(raw)
    entries = _parse(raw, path)
    tensors = {name: _entry(name, entry, path, 8 + length) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(ordered, path, 8 + length, size)
    return ordered


def read_header_text(path: Path) -> str:
    """The JSON text of a file's header as it is, padding included. Errors as in read_header."""
    raw, _ = _read_raw_header(path)
    _parse(raw, path)
    return raw.decode("utf-8")


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """The header's bytes and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            prefix = file.read(8)
            if prefix == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes, no room for a header; download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file or is corrupt: its header would be {length} bytes long "
                    f"(at most {MAX_HEADER_BYTES}); download it again"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated: {size} bytes, but its header reaches to byte {8 + length}; download it again"
                )
            raw = bytearray(length)
            _read_exact(file, memoryview(raw), 8, f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return bytes(raw), size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return entries


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: its header is not valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    return header


def _entry(name: str, entry: Any, path: Path, data: int) -> TensorInfo:
    def corrupt(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {problem}; the file is corrupt, download it again")

    if not isinstance(entry, dict):
        raise corrupt(f"its header entry is {entry!r}, not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise corrupt(f"unknown dtype {dtype!r} (known: {', '.join(DTYPE_BYTES)})")
    if not _are_sizes(shape):
        raise corrupt(f"its shape is {shape!r}, not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"its data_offsets are {offsets!r}, not [begin, end]")
    info = TensorInfo(path, dtype, tuple(shape), data + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise corrupt(
            f"its data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"but shape {shape} in {dtype} needs {info.nbytes}"
        )
    return info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(ordered: dict[str, TensorInfo], path: Path, data: int, size: int) -> None:
    end, previous = data, "the header"
    for name, info in ordered.items():
        if info.offset < end:
            raise CheckpointError(
                f"{path}: tensor {name!r} overlaps {previous!r}: it begins at byte {info.offset}, "
                f"before byte {end}; the file is corrupt, download it again"
            )
        if info.offset > end:
            raise CheckpointError(
                f"{path}: tensor {name!r} leaves a hole of {info.offset - end} bytes after {previous!r}; "
                "the file is corrupt, download it again"
            )
        end, previous = info.offset + info.nbytes, name
        if end > size:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes, but tensor {name!r} reaches to byte {end}; download it again"
            )
    if end != size:
        raise CheckpointError(
            f"{path} is {size} bytes, but its last tensor {previous!r} ends at byte {end}; "
            "the file is corrupt, download it again"
        )


def read_rows(
    file: io.RawIOBase,
    name: str,
    info: TensorInfo,
    out: Array,
    dtype: str,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Read tensor `name`, or its rows [rows[0], rows[1]) along the first axis, into `out`; of a row those columns.

    `file` is `info.file` opened unbuffered, and asked for no other bytes. `out` is a flat contiguous array of exactly
    those elements, in the storage of `dtype` (F32, BF16 or F16, see dtypes.py; U8 of a U8 alone). Equal dtypes are read
    without a copy; otherwise tiles of TILE_ELEMENTS are converted, narrowing rounded to nearest even. `on_bytes` is
    told the bytes of the file as they are read.
    Raises CheckpointError when the file ends early, its dtype is none of the three, or a value is beyond float16.
    """
    if info.dtype not in (READ if dtype == BYTES else STORAGE):
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype}; this loader reads {', '.join(STORAGE)}: "
            "use the bfloat16 or float16 edition of the checkpoint"
        )
    total = info.shape[0] if info.shape else 1
    begin, end = rows if rows is not None else (0, total)
    if not 0 <= begin <= end <= total:
        raise ValueError(f"rows [{begin}, {end}) are not within the {total} rows of tensor {name!r}")
    whole = math.prod(info.shape[1:])
    left, right = columns if columns is not None else (0, whole)
    if not 0 <= left <= right <= whole:
        raise ValueError(f"columns [{left}, {right}) are not within the {whole} columns of tensor {name!r}")
    width = right - left
    count = (end - begin) * width
    if out.shape != (count,) or out.dtype != READ[dtype] or not out.flags.c_contiguous:
        raise ValueError(f"tensor {name!r} needs a flat {READ[dtype]} array of {count}, got {out.dtype} {out.shape}")
    where = f"{info.file}: tensor {name!r}"
    source_type = READ[info.dtype]
    # Neighbours in the file are read as they come; of rows with others between them as many at once as a tile holds.
    run = width if width < whole else count
    step = TILE_ELEMENTS if run == count else max(1, TILE_ELEMENTS // max(1, run)) * run
    buffer = np.empty(0 if info.dtype == dtype else min(step, count), source_type)
    position = info.offset + (begin * whole + left) * source_type.itemsize
    for start in range(0, count, max(1, step)):
        target = out[start : start + step]
        source = target if info.dtype == dtype else buffer[: target.size]
        if run == count:
            _read_exact(file, source.data.cast("B"), position + start * source_type.itemsize, where)
        else:
            pitch = whole * source_type.itemsize
            rows_of_bytes = source.view(np.uint8).reshape(-1, run * source_type.itemsize)
            _read_runs(file, rows_of_bytes, position + start // run * pitch, pitch, where)
        if info.dtype != dtype:
            cast(source, info.dtype, target, dtype, where)
        if on_bytes is not None:
            on_bytes(source.nbytes)


def _read_runs(file: io.RawIOBase, rows: Array, position: int, pitch: int, where: str) -> None:
    """Fills rows of bytes that lie at a distance of `pitch` in the file."""
    if not isinstance(file, RowFile):
        for number, row in enumerate(rows):
            _read_exact(file, row.data, position + number * pitch, where)
        return
    try:
        done = file.read_rows(position, pitch, rows)
    except OSError as error:
        raise CheckpointError(f"{where}: reading rows from byte {position} on failed: {error.strerror}") from error
    if done < rows.nbytes:
        row, byte = divmod(done, rows.shape[1])
        raise _ended(where, position + row * pitch + byte)


def _read_exact(file: io.RawIOBase, view: memoryview, position: int, where: str) -> None:
    file.seek(position)
    done = 0
    while done < len(view):
        try:
            got = file.readinto(view[done:])
        except OSError as error:
            raise CheckpointError(f"{where}: reading byte {position + done} failed: {error.strerror}") from error
        if not got:
            raise _ended(where, position + done)
        done += got


def _ended(where: str, position: int) -> CheckpointError:
    return CheckpointError(f"{where}: the file ended at byte {position} while it was read; download it again")


def cast(source: Array, source_dtype: str, target: Array, target_dtype: str, where: str) -> None:
    """Fills `target` with values of another type, rounded to nearest even. CheckpointError, which begins with `where`,
    for one beyond float16.
    """
    wide = _widen(source) if source_dtype == "BF16" else source
    if target_dtype == "BF16":
        target[:] = _bfloat16_bits(wide.astype(np.float32, copy=False))
    elif target_dtype == "F16":
        with np.errstate(over="ignore"):
            target[:] = wide
        lost = np.isinf(target) & np.isfinite(wide)
        if lost.any():
            raise CheckpointError(
                f"{where} holds {float(wide[lost][0]):g}, beyond float16's {FLOAT16_MAX:g}: "
                "load it as bfloat16 or float32"
            )
    else:
        target[:] = wide


def _widen(bits: Array) -> Array:
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _bfloat16_bits(values: Array) -> Array:
    """Round float32 to nearest even; a NaN stays a NaN whatever its low bits are."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)
