"""A checkpoint directory in any of the forms this package reads or writes, seen as the published tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_qwen1m.config import ModelConfig
from paddle_qwen1m.config_keys import own_quantization
from paddle_qwen1m.dtypes import SAFETENSORS
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import ROWS

from . import names, sharding
from .checkpoint import INDEX_NAME, Checkpoint, Described, as_published, check_fit, read_weight_map, summarise
from .eight_bit import FILE_DTYPES, SCALES, is_linear
from .record import PublishedFiles, Record, refuse_unfinished
from .safetensors import CheckpointError, TensorInfo, read_header
from .tensors import HEAD, part_of, published_shapes
from .window import Piece

CONFIG_NAME = "config.json"
HUGGINGFACE, PADDLENLP, TENSOR_PARALLEL = "huggingface", "paddlenlp", "tensor-parallel"


@dataclass(frozen=True)
class Tensor:
    """A published tensor: its shape, and the stored pieces of the matrix it is; see window.Piece. scales: of numbers
    of 8 bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    scales: TensorInfo | None = None

    @property
    def file(self) -> Path:
        """Where its first piece lies."""
        return self.pieces[0].info.file


@dataclass(frozen=True)
class Source:
    """`partition`: the files of the published form, and their tensors in the order of the data.

    `published`: what the published form looked like, where that is known. quantization: how the linears' weights are
    kept, None: like the rest. `absent`: files of weights that are not
    there; shapes and dtypes of their tensors are then those of config.json.
    """

    directory: Path
    form: str
    config: Mapping[str, Any]
    model: ModelConfig
    tensors: Mapping[str, Tensor]
    partition: Mapping[str, Sequence[str]]
    published: PublishedFiles | None
    quantization: str | None = None
    absent: Sequence[str] = ()

    @property
    def files(self) -> list[Path]:
        """Every file of weights, once."""
        return sorted({piece.info.file for tensor in self.tensors.values() for piece in tensor.pieces})


def open_source(directory: Path, *, allow_absent: bool = False) -> Source:
    """Reads config.json, indexes and headers, and checks that they are a whole model.

    With `allow_absent` the shards of an index may be missing. Raises CheckpointError saying what does not fit.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the directory that holds a checkpoint")
    config = read_object(directory / CONFIG_NAME)
    try:
        model = ModelConfig.from_dict(config, str(directory / CONFIG_NAME))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    refuse_unfinished(directory)
    record = Record.read(directory)
    degree = sharding.rank_sets(config)
    absent: list[str] = []
    stored: Mapping[str, Described]
    if degree is not None:
        form = TENSOR_PARALLEL
        tensors, partition = _rank_set(directory, model, config)
        stored = tensors
    else:
        found, is_paddlenlp = _whole(directory, model, absent if allow_absent else None)
        form, stored = PADDLENLP if is_paddlenlp else HUGGINGFACE, found
        weights = {name: info for name, info in found.items() if not _are_scales(name, found)}
        tensors = {
            name: Tensor(name, info.dtype, info.shape, (Piece(name, info),), found.get(f"{name}{SCALES}"))
            for name, info in weights.items()
        }
        partition = _partition(weights)
    check_fit(directory, stored, published_shapes(model), spare={HEAD})
    quantization = own_quantization(config)
    if not absent:
        _check_quantization(directory, tensors, quantization)
    published = record.published if record is not None and form != HUGGINGFACE else None
    if form == HUGGINGFACE and not absent:
        published = PublishedFiles.of(directory, CONFIG_NAME, INDEX_NAME, list(partition))
    elif published is not None:
        known = {file: [name for name, _, _ in published.entries(file)] for file in published.headers}
        if {name for members in known.values() for name in members} == set(tensors):
            partition = known
        else:
            published = None
    return Source(directory, form, config, model, tensors, partition, published, quantization, absent)


def _are_scales(name: str, found: Mapping[str, TensorInfo]) -> bool:
    return name.endswith(SCALES) and name[: -len(SCALES)] in found


def _check_quantization(directory: Path, tensors: Mapping[str, Tensor], quantization: str | None) -> None:
    """CheckpointError unless the linears, and nothing else, are what config.json says."""
    for name, tensor in tensors.items():
        dtype = FILE_DTYPES[quantization] if quantization is not None and is_linear(name) else None
        if (tensor.dtype if tensor.scales is not None else None) != dtype:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} says that weights are kept as {quantization or 'they were published'}, "
                f"tensor {name!r} is {tensor.dtype}: the directory is put together of two checkpoints"
            )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError when it cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _whole(directory: Path, model: ModelConfig, absent: list[str] | None) -> tuple[Mapping[str, TensorInfo], bool]:
    """The published tensors, and whether the files are PaddleNLP's.

    With a list, missing shards are named in it and described by the config.
    """
    index = directory / INDEX_NAME
    if absent is not None and index.exists():
        weight_map = read_weight_map(index)
        absent += [file for file in sorted(set(weight_map.values())) if not (directory / file).exists()]
        if absent:
            return _described(directory, model, weight_map, absent), names.are_paddlenlp(weight_map)
    checkpoint = Checkpoint(directory)
    return checkpoint.tensors, checkpoint.is_paddlenlp


def _described(
    directory: Path, model: ModelConfig, weight_map: Mapping[str, str], absent: Sequence[str]
) -> dict[str, TensorInfo]:
    """What the headers that are there and the config say of the tensors of an index."""
    headers = [read_header(directory / file) for file in set(weight_map.values()) - set(absent)]
    tensors = as_published({name: info for header in headers for name, info in header.items() if name in weight_map})
    for stored, file in weight_map.items():
        name = names.from_paddlenlp(stored)
        if file in absent and name in published_shapes(model):
            tensors[name] = TensorInfo(directory / file, SAFETENSORS[model.dtype], published_shapes(model)[name], 0)
    return tensors


def _partition(tensors: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    partition: dict[str, list[str]] = {}
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file.name, item[1].offset)):
        partition.setdefault(info.file.name, []).append(name)
    return partition


def _rank_set(
    directory: Path, model: ModelConfig, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    try:
        placement = sharding.recorded_placement(config, model)
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: {error}") from None
    assert placement is not None
    degree = placement.degree
    ranks = [Checkpoint(directory / sharding.rank_directory(rank, degree)) for rank in range(degree)]
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, first in ranks[0].tensors.items():
        holders = [rank for rank in range(degree) if name in ranks[rank].tensors]
        if len(holders) < degree:
            problems += [f"rank {rank} lacks tensor {name!r}" for rank in range(degree) if rank not in holders]
            continue
        pieces, whole = _pieces(ranks, model, placement, name, problems)
        if {rank.tensors[name].dtype for rank in ranks} != {first.dtype}:
            problems.append(f"tensor {name!r} has several dtypes")
        tensors[name] = Tensor(name, first.dtype, whole, pieces)
    if problems:
        raise CheckpointError(f"{directory} is not one whole rank set:\n{summarise(problems)}")
    return tensors, _partition(ranks[0].tensors)


def _pieces(
    ranks: Sequence[Checkpoint], model: ModelConfig, placement: Placement, name: str, problems: list[str]
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """The ranks' parts of a tensor, each once, and its whole shape."""
    parts = [part_of(model, name, placement, rank) for rank in range(len(ranks))]
    if parts[0] is None:
        return (Piece(name, ranks[0].tensors[name]),), ranks[0].tensors[name].shape
    axis = parts[0].axis
    pieces: dict[int, Piece] = {}
    size = max(end for part in parts if part is not None for _, end in part.ranges)
    whole = ranks[0].tensors[name].shape
    whole = (*whole[:axis], size, *whole[axis + 1 :])
    for rank, part in enumerate(parts):
        info = ranks[rank].tensors[name]
        assert part is not None
        expected = (*whole[:axis], part.size, *whole[axis + 1 :])
        if info.shape != expected:
            problems.append(f"rank {rank}: tensor {name!r} has shape {list(info.shape)}, expected {list(expected)}")
            continue
        at = 0
        for begin, end in part.ranges:
            stored, at = (at, at + end - begin), at + end - begin
            if begin == end:
                continue
            piece = Piece(name, info, begin, 0, stored) if axis == ROWS else Piece(name, info, 0, begin, None, stored)
            pieces.setdefault(begin, piece)
    return tuple(pieces.values()), whole
