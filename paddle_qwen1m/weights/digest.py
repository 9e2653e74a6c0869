"""One name for a checkpoint's weights, from a thousandth of their bytes: caches and stores are named by it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .checkpoint import Checkpoint
from .safetensors import CheckpointError, TensorInfo, read_header
from .sharding import rank_directory, rank_sets
from .source import CONFIG_NAME

PLACES, PLACE_BYTES = 16, 4096
READERS = 16  # at once: what takes time is waiting for a disk


def checkpoint_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 in hex over config.json and, for every file of weights in order of name, its name, size, header and
    PLACE_BYTES at PLACES places of each tensor, spread evenly from its first byte to its last; smaller tensors whole.

    A checkpoint has the same on every rank, for every degree and in every folder it is copied to; weights that were
    trained on have another. Where it is cut for ranks, the files of all of them count. 14B: 40 MB are read.
    Raises CheckpointError when files are missing or corrupt.
    """
    directory = Path(directory)
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    config = _read(directory / CONFIG_NAME)
    add(config)
    with ThreadPoolExecutor(READERS) as readers:
        for file in _files(directory, config):
            tensors = read_header(file)
            size = file.stat().st_size
            begin = min((info.offset for info in tensors.values()), default=size)
            add(file.relative_to(directory).as_posix().encode())
            add(size.to_bytes(8, "little"))
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
                ranges = [(0, begin), *(place for info in tensors.values() for place in places(info))]
                for data in readers.map(lambda place, at=descriptor, of=file: _read_at(at, of, *place), ranges):
                    add(data)
            finally:
                os.close(descriptor)
    return digest.hexdigest()


def places(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Offset in the file and length of each range of bytes that stands for a tensor."""
    if info.nbytes <= PLACES * PLACE_BYTES:
        yield info.offset, info.nbytes
        return
    for number in range(PLACES):
        yield info.offset + (info.nbytes - PLACE_BYTES) * number // (PLACES - 1), PLACE_BYTES


def _files(directory: Path, config: bytes) -> list[Path]:
    """Every file of weights, in order of its path."""
    try:
        described = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} is not valid JSON: {error}") from None
    degree = rank_sets(described) if isinstance(described, dict) else None
    folders = [directory]
    if isinstance(degree, int):
        folders = [directory / rank_directory(rank, degree) for rank in range(degree)]
    return sorted({info.file for folder in folders for info in Checkpoint(folder).tensors.values()})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_at(descriptor: int, file: Path, offset: int, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        try:
            got = os.pread(descriptor, nbytes - len(data), offset + len(data))
        except OSError as error:
            raise CheckpointError(f"{file}: reading byte {offset + len(data)} failed: {error.strerror}") from error
        if not got:
            raise CheckpointError(f"{file} ended at byte {offset + len(data)} while it was read; download it again")
        data += got
    return data
