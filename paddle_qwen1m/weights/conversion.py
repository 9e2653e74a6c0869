"""The plan of a conversion: every file that will be written, down to its headers, before any data is read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from paddle_qwen1m.config import SPARSE_CONFIG, default_budgets
from paddle_qwen1m.config_keys import QUANTIZATION, own_quantization_config
from paddle_qwen1m.dtypes import SAFETENSORS
from paddle_qwen1m.parallel.placement import Placement
from paddle_qwen1m.parallel.split import Part, check_degree

from . import names
from .checkpoint import INDEX_NAME, SINGLE_NAME, index_metadata
from .eight_bit import FILE_BLOCKS, FILE_DTYPES, LARGEST_BLOCK, SCALES, is_linear
from .record import RECORD_NAME, PublishedFiles
from .safetensors import DTYPE_BYTES
from .sharding import RANK_HEADS, RANK_SETS, rank_directory
from .source import (
    CONFIG_NAME,
    HUGGINGFACE,
    PADDLENLP,
    TENSOR_PARALLEL,
    Source,
    Tensor,
)
from .tensors import part_of

COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.md", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
FORMATS = {HUGGINGFACE: "pt", PADDLENLP: "np", TENSOR_PARALLEL: "pt"}  # what safetensors metadata says of the layout
NOT_QUANTISED = "none"
Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Target:
    """A file of weights to write: `header` with its length before it, then `parts` of the group's tensors."""

    file: str
    header: bytes
    entries: tuple[Entry, ...]
    parts: tuple[Part | None, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(_nbytes(dtype, shape) for _, dtype, shape in self.entries)


@dataclass(frozen=True)
class Group:
    """Files that are written in one pass over the same tensors; `flipped`: which of them are written transposed,
    `kinds`: which become numbers of 8 bits, whose scales lie behind them.
    """

    tensors: tuple[Tensor, ...]
    dtypes: tuple[str, ...]
    flipped: tuple[bool, ...]
    kinds: tuple[str | None, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Plan:
    """`companions` are copied, `documents` and then `indexes` written; both map a path to its content."""

    source: Source
    form: str
    degree: int
    groups: tuple[Group, ...]
    companions: tuple[str, ...]
    documents: Mapping[str, bytes]
    indexes: Mapping[str, bytes]

    @property
    def targets(self) -> list[Target]:
        return [target for group in self.groups for target in group.targets]

    @property
    def digest(self) -> str:
        """Identifies what is read and what is written: an interrupted conversion goes on only where it is the same."""
        seen = [(str(file.relative_to(self.source.directory)), file.stat()) for file in self.source.files]
        directory = self.source.directory
        what = [
            self.form,
            [(file, status.st_size, status.st_mtime_ns) for file, status in seen],
            [(name, hashlib.sha256((directory / name).read_bytes()).hexdigest()) for name in self.companions],
            [(target.file, target.header.decode("utf-8", "surrogateescape")) for target in self.targets],
            [(file, text.decode()) for file, text in (*self.documents.items(), *self.indexes.items())],
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def plan_conversion(
    source: Source,
    form: str,
    *,
    degree: int = 1,
    dtype: str | None = None,
    quantization: str | None = None,
    max_shard_bytes: int | None = None,
) -> Plan:
    """What it takes to write `source` in `form`; the same every time.

    dtype: convert every tensor to "float32", "float16" or "bfloat16"; None keeps each as it is.
    quantization: "fp8" or "int8" rounds the linears' weights, "none" gives those of a rounded source their type in
        config.json; None keeps what is there.
    max_shard_bytes: distribute the tensors anew, over files that are no larger unless one tensor is; None keeps the
        partition of the published form, as far as it is known, or of the source.
    Raises ValueError for a degree that does not fit form or model.
    """
    if form == TENSOR_PARALLEL:
        if degree < 2:
            raise ValueError(f"the format {form} needs a tensor parallel size of at least 2, got {degree}")
        check_degree(source.model, degree)
    elif degree != 1:
        raise ValueError(f"a tensor parallel size of {degree} needs the format {TENSOR_PARALLEL}, not {form}")
    placement = _placement(source, degree)
    _check_quantization(source, form, quantization)
    kind = None if quantization == NOT_QUANTISED else quantization
    partition = source.partition
    if max_shard_bytes is not None:
        partition = _distribute(source, placement, dtype, kind, max_shard_bytes)
    published = source.published
    kept = published if partition is source.partition else None
    groups = [_group(source, form, placement, dtype, kind, file, tensors, kept) for file, tensors in partition.items()]
    indexes: dict[str, bytes] = {}
    had_index = partition is source.partition and published is not None and published.index is not None
    if had_index or list(partition) != [SINGLE_NAME]:
        for rank in range(degree):
            targets = [group.targets[rank] for group in groups]
            indexes[_place(form, rank, degree, INDEX_NAME)] = _index(form, targets, published)
    return Plan(
        source,
        form,
        degree,
        tuple(groups),
        _companions(source),
        {CONFIG_NAME: _config(source, form, placement, dtype, kind)},
        indexes,
    )


def _placement(source: Source, degree: int) -> Placement:
    """As the budgets that lie beside the weights, or are published for them, make the ranks' work even."""
    beside = source.directory / SPARSE_CONFIG
    budgets, _ = default_budgets(source.model, beside if beside.is_file() else None)
    return Placement.balanced(source.model, degree, budgets)


def _check_quantization(source: Source, form: str, quantization: str | None) -> None:
    """ValueError for what is not written: see plan_conversion."""
    if source.quantization is not None and quantization != NOT_QUANTISED:
        raise ValueError(
            f"{source.directory} holds weights in {source.quantization}, which are converted back alone: give the "
            f"quantization {NOT_QUANTISED}, or convert the checkpoint that they were made from"
        )
    if source.quantization is None and quantization in (None, NOT_QUANTISED):
        return
    if form != HUGGINGFACE:
        raise ValueError(
            f"weights of 8 bits are written to and read from the format {HUGGINGFACE} alone, of which each rank reads "
            f"its own part, got {form}"
        )
    if quantization == NOT_QUANTISED:
        return
    for name, tensor in source.tensors.items():
        if is_linear(name) and any(size % LARGEST_BLOCK for size in tensor.shape):
            raise ValueError(
                f"weights of 8 bits are written in blocks of {LARGEST_BLOCK}, tensor {name!r} is {list(tensor.shape)}"
            )


def _dtype(tensor: Tensor, source: Source, dtype: str | None) -> str:
    """How a tensor that is not rounded is written."""
    if dtype is not None:
        return SAFETENSORS[dtype]
    return tensor.dtype if tensor.scales is None else SAFETENSORS[source.model.dtype]


def _entries(name: str, dtype: str, shape: tuple[int, ...], kind: str | None) -> list[Entry]:
    """What a file holds of a tensor."""
    if kind is None:
        return [(name, dtype, shape)]
    return [(name, FILE_DTYPES[kind], shape), (f"{name}{SCALES}", "F32", FILE_BLOCKS[kind].grid(shape))]


def _group(
    source: Source,
    form: str,
    placement: Placement,
    dtype: str | None,
    kind: str | None,
    file: str,
    members: Sequence[str],
    published: PublishedFiles | None,
) -> Group:
    tensors = [source.tensors[name] for name in members]
    kinds = [kind if is_linear(name) else None for name in members]
    dtypes = [tensor.dtype if own is not None else _dtype(tensor, source, dtype) for tensor, own in zip(tensors, kinds)]
    tied = source.model.tie_word_embeddings
    flipped = [form == PADDLENLP and names.is_transposed(name, tied) for name in members]
    targets = []
    for rank in range(placement.degree):
        parts = [part_of(source.model, name, placement, rank) for name in members]
        entries: list[Entry] = []
        for tensor, own, flip, part, rounded in zip(tensors, dtypes, flipped, parts, kinds):
            name = names.to_paddlenlp(tensor.name) if form == PADDLENLP else tensor.name
            entries += _entries(name, own, _shape(tensor.shape, flip, part), rounded)
        header = _header(form, file, entries, published)
        targets.append(Target(_place(form, rank, placement.degree, file), header, tuple(entries), tuple(parts)))
    return Group(tuple(tensors), tuple(dtypes), tuple(flipped), tuple(kinds), tuple(targets))


def _shape(shape: tuple[int, ...], flipped: bool, part: Part | None) -> tuple[int, ...]:
    if part is not None:
        shape = (*shape[: part.axis], part.size, *shape[part.axis + 1 :])
    return shape[::-1] if flipped else shape


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _place(form: str, rank: int, degree: int, file: str) -> str:
    return f"{rank_directory(rank, degree)}/{file}" if form == TENSOR_PARALLEL else file


def _header(form: str, file: str, entries: Sequence[Entry], published: PublishedFiles | None) -> bytes:
    """The published header itself where it describes the same tensors."""
    metadata = {"format": FORMATS[form]}
    if form == HUGGINGFACE and published is not None:
        if published.entries(file) == list(entries):
            raw = published.headers[file].encode("utf-8")
            return struct.pack("<Q", len(raw)) + raw
        metadata = published.metadata(file) or metadata
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _index(form: str, targets: Sequence[Target], published: PublishedFiles | None) -> bytes:
    """The published index itself where it says the same."""
    weight_map = {name: target.file.rsplit("/", 1)[-1] for target in targets for name, _, _ in target.entries}
    total = sum(target.nbytes - len(target.header) for target in targets)
    known: dict[str, Any] = {}
    if form == HUGGINGFACE and published is not None and published.index is not None:
        known = json.loads(published.index)
    metadata = {**index_metadata(known), "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    if published is not None and published.index is not None and index == known:
        return published.index.encode("utf-8")
    return json.dumps(index, indent=2).encode("utf-8") + b"\n"


def _config(source: Source, form: str, placement: Placement, dtype: str | None, kind: str | None) -> bytes:
    """The published file itself where it says the same."""
    values = {key: value for key, value in source.config.items() if key not in (RANK_SETS, RANK_HEADS)}
    if form == TENSOR_PARALLEL:
        values.update({RANK_SETS: placement.degree, RANK_HEADS: placement.text})
    if source.quantization is not None:
        del values[QUANTIZATION]
    if kind is not None:
        values[QUANTIZATION] = own_quantization_config(kind)
    if dtype is not None:
        spelled = [key for key in ("torch_dtype", "dtype") if key in values]
        values.update(dict.fromkeys(spelled or ["torch_dtype"], dtype))
    if source.published is not None and json.loads(source.published.config) == values:
        return source.published.config.encode("utf-8")
    return json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"


def _companions(source: Source) -> tuple[str, ...]:
    """Tokenizer, generation settings, sparse budgets, texts: what lies beside the weights and is copied as it is."""
    own = (CONFIG_NAME, RECORD_NAME)
    return tuple(
        path.name
        for path in sorted(source.directory.iterdir())
        if path.is_file()
        and path.name not in own
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
    )


def _distribute(
    source: Source, placement: Placement, dtype: str | None, kind: str | None, limit: int
) -> dict[str, list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name in (name for members in source.partition.values() for name in members):
        tensor, part = source.tensors[name], part_of(source.model, name, placement, 0)
        shape, rounded = _shape(tensor.shape, False, part), kind if is_linear(name) else None
        entries = _entries(name, _dtype(tensor, source, dtype), shape, rounded)
        nbytes = sum(_nbytes(own, size) for _, own, size in entries)
        if not shards or nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
