"""A checkpoint directory in the published layout: which tensor lies in which file, checked against the files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from paddle_qwen1m.dtypes import STORAGE

from . import names
from .eight_bit import FILE_BLOCKS, FILE_KINDS, SCALES, is_linear
from .foreign import describe_adapter, describe_quantised, describe_weights
from .record import refuse_unfinished
from .safetensors import CheckpointError, TensorInfo, read_header
from .sharding import RANK_PREFIX
from .tensors import EMBEDDING, HEAD

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LISTED = 8

logger = logging.getLogger(__name__)


def summarise(problems: Sequence[str]) -> str:
    """The first problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:LISTED]]
    if len(problems) > LISTED:
        lines.append(f"  ... and {len(problems) - LISTED} more")
    return "\n".join(lines)


class Checkpoint:
    """The tensors of a directory that holds model.safetensors, or shards and model.safetensors.index.json.

    `tensors` are the published ones, in a directory in PaddleNLP's own form (`is_paddlenlp`) too.
    Only headers are read. Raises CheckpointError naming file and tensor when a file is missing or corrupt, or when the
    index and the files disagree, or when a conversion into the directory has not ended.
    """

    directory: Path
    tensors: Mapping[str, TensorInfo]
    is_paddlenlp: bool

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a directory: give the directory that holds {SINGLE_NAME}")
        refuse_unfinished(self.directory.parent if self.directory.name.startswith(RANK_PREFIX) else self.directory)
        adapter = describe_adapter(self.directory)
        if adapter:
            raise CheckpointError(f"{self.directory}: {adapter}")
        index, single = self.directory / INDEX_NAME, self.directory / SINGLE_NAME
        if index.exists():
            stored = _read_sharded(index)
        elif single.exists():
            stored = read_header(single)
        else:
            held = describe_weights(self.directory) or (
                "this loader reads checkpoints in the published safetensors layout; download one of the two"
            )
            raise CheckpointError(f"{self.directory} holds neither {INDEX_NAME} nor {SINGLE_NAME}: {held}")
        self.is_paddlenlp = names.are_paddlenlp(stored)
        self.tensors = as_published(stored)

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def largest_tensor_bytes(self) -> int:
        return max((info.nbytes for info in self.tensors.values()), default=0)


def as_published(stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The published tensors that files in either form hold, by their stored names.

    In PaddleNLP's, a head that is as tall as the embedding is the embedding once more, and not transposed.
    """
    if not names.are_paddlenlp(stored):
        return dict(stored)
    head, embedding = stored.get(HEAD), stored.get(names.to_paddlenlp(EMBEDDING))
    tied = head is not None and embedding is not None and head.shape == embedding.shape != head.shape[::-1]
    published = {}
    for stored_name, info in stored.items():
        name = names.from_paddlenlp(stored_name)
        published[name] = info.flipped() if names.is_transposed(name, tied) else info
    return published


class Described(Protocol):
    """What the header of a file says of a tensor."""

    @property
    def file(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_fit(
    directory: Path,
    tensors: Mapping[str, Described],
    shapes: Mapping[str, tuple[int, ...]],
    spare: Collection[str],
) -> None:
    """CheckpointError, naming file and tensor, unless the published `tensors` of `directory` are those of `shapes`.

    Those in `spare` and rotary tables may be there too. A linear's numbers may have 8 bits, with scales beside them as
    this package writes them.
    """
    problems = [f"missing: tensor {name!r} is in none of the files" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        of = name[: -len(SCALES)] if name.endswith(SCALES) else ""
        if is_linear(of) and of in tensors:
            if of in shapes:
                problems += _unfit_scales(name, tensor, tensors[of])
        elif name not in shapes:
            if name not in spare and not name.endswith(names.DERIVED_SUFFIX):
                problems.append(
                    f"{tensor.file.name}: tensor {name!r} has no place in the model, which without it would compute "
                    "something else than it was trained to"
                )
        elif tensor.shape != shapes[name]:
            problems.append(
                f"{tensor.file.name}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"the model's config.json asks for {list(shapes[name])}"
            )
        elif tensor.dtype not in STORAGE and not _has_scales(name, tensor, tensors):
            problems.append(f"{tensor.file.name}: tensor {name!r} is {tensor.dtype}, not one of {', '.join(STORAGE)}")
    if problems:
        quantised = describe_quantised(tensors)
        advice = (
            f"The weights are quantised ({quantised}), which are not read: load the checkpoint they were made from."
            if quantised
            else "Check that config.json and the safetensors files are of the same model, or download the directory "
            "again."
        )
        raise CheckpointError(
            f"{directory} does not fit the model that its config.json describes:\n{summarise(problems)}\n{advice}"
        )


def _has_scales(name: str, tensor: Described, tensors: Mapping[str, Described]) -> bool:
    """Whether these are numbers of 8 bits as this package writes them."""
    return is_linear(name) and tensor.dtype in FILE_KINDS and f"{name}{SCALES}" in tensors


def _unfit_scales(name: str, scales: Described, numbers: Described) -> list[str]:
    """What is wrong with the scales of a weight."""
    kind = FILE_KINDS.get(numbers.dtype)
    if kind is None:
        return [f"{scales.file.name}: tensor {name!r} scales numbers of {numbers.dtype}, not {' or '.join(FILE_KINDS)}"]
    wanted = FILE_BLOCKS[kind].grid(numbers.shape)
    if scales.dtype == "F32" and scales.shape == wanted:
        return []
    return [f"{scales.file.name}: tensor {name!r} is {scales.dtype} {list(scales.shape)}, expected F32 {list(wanted)}"]


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, by an index. Raises CheckpointError."""
    weight_map: dict[str, str] = _read_index(index)["weight_map"]
    return weight_map


def index_metadata(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an index says beside its weight_map. Nothing depends on it: tools write it carelessly, or not at all."""
    metadata = content.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _read_index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is corrupt: not valid JSON ({error}); download it again") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor to file: download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {file!r}, not to a file of the same directory"
            )
    return content


def _read_sharded(index: Path) -> dict[str, TensorInfo]:
    content = _read_index(index)
    weight_map = content["weight_map"]
    files = sorted(set(weight_map.values()))
    if SINGLE_NAME not in files and (index.parent / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{index.parent} holds both {INDEX_NAME} and a {SINGLE_NAME} that the index does not name: "
            "two checkpoints lie in one directory; remove the one you do not want"
        )
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        named = [name for name, holder in weight_map.items() if holder == file]
        path = index.parent / file
        if not path.exists():
            problems.append(f"{path} is missing; it should hold {len(named)} tensors, {named[0]!r} the first")
            continue
        found = read_header(path)
        problems += [
            f"{path}: tensor {name!r} is in the index, not in the file"
            for name in named
            if name not in found and not name.endswith(names.DERIVED_SUFFIX)
        ]
        for name, info in found.items():
            if weight_map.get(name) == file:
                tensors[name] = info
            elif name in weight_map:
                problems.append(
                    f"{path}: tensor {name!r} is in the file, but the index places it in {weight_map[name]}"
                )
            else:
                problems.append(f"{path}: tensor {name!r} is in the file, not in the index")
    if problems:
        raise CheckpointError(
            f"{index} disagrees with the files:\n{summarise(problems)}\n"
            "The download is incomplete or mixes two checkpoints: download the directory again."
        )
    total, stated = sum(info.nbytes for info in tensors.values()), index_metadata(content).get("total_size")
    if stated not in (None, total):
        logger.warning(
            f"{index} states a total_size of {stated!r} bytes, the tensors of its files hold {total}: the index was "
            "edited or left behind by a tool; every tensor is there as the index has it, and that is what counts"
        )
    return tensors
