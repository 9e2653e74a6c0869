"""Converts a checkpoint into another form: checks first, streams file by file, goes on where it was interrupted."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from paddle_qwen1m.fileio.durable import publish, temporary, write_whole

from .checkpoint import summarise
from .conversion import Plan, plan_conversion
from .record import RECORD_NAME, Record
from .source import HUGGINGFACE, open_source
from .stream import differing_shards, write_shards

SPARE_BYTES = 1 << 20  # on the disk, for directories and the record


class ConversionError(ValueError):
    """A conversion cannot start or go on as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What a conversion wrote, and the part of it that was there already."""

    files: int
    nbytes: int
    kept: int


def plan(
    source: str | os.PathLike[str],
    form: str,
    *,
    degree: int = 1,
    dtype: str | None = None,
    quantization: str | None = None,
    max_shard_bytes: int | None = None,
    allow_absent: bool = True,
) -> Plan:
    """The plan alone, for which the shards that an index names need not be there unless `allow_absent` is False."""
    checkpoint = open_source(Path(source), allow_absent=allow_absent)
    try:
        return plan_conversion(
            checkpoint,
            form,
            degree=degree,
            dtype=dtype,
            quantization=quantization,
            max_shard_bytes=max_shard_bytes,
        )
    except ValueError as error:
        raise ConversionError(str(error)) from None


def describe(wanted: Plan) -> Iterator[str]:
    """The plan, line by line: what is read, every file that will be written, what they come to."""
    source = wanted.source
    yield f"from {source.directory}: {source.form}, {len(source.tensors)} tensors in {len(source.files)} files"
    if source.absent:
        yield f"  {len(source.absent)} of these are not there; shapes and dtype of their tensors are config.json's"
    degree = f" for {wanted.degree} ranks" if wanted.degree > 1 else ""
    yield f"to {wanted.form}{degree}:"
    for target in wanted.targets:
        yield f"  {target.file}  {len(target.entries)} tensors  {target.nbytes:,} bytes"
    for name in (*wanted.companions, *wanted.documents, *wanted.indexes):
        yield f"  {name}"
    yield f"{len(wanted.targets)} files of weights, {sum(target.nbytes for target in wanted.targets):,} bytes"


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    form: str,
    *,
    degree: int = 1,
    dtype: str | None = None,
    quantization: str | None = None,
    max_shard_bytes: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> Outcome:
    """Write the checkpoint in `source` to `destination`, a new or empty directory, in another form.

    form: "paddlenlp", which PaddleNLP's own Qwen2ForCausalLM loads, "tensor-parallel", a folder for each of `degree`
        ranks, or "huggingface", the published one. The source may have any of the three.
    dtype: "float32", "float16" or "bfloat16", rounded to nearest even; None keeps what is there.
    quantization, max_shard_bytes: see conversion.plan_conversion.
    verify: read everything again afterwards and compare sizes, headers and SHA-256.
    progress: stderr tells how far it is: a bar on a terminal, lines elsewhere.

    Memory is bounded by a few panels of a tensor, whatever the size of tensors and shards. An interrupted call is
    repeated with the same arguments: finished shards are kept. While it is unfinished the directory has no index, and
    this package refuses to load it.
    Raises ConversionError, weights.CheckpointError for a source that is not whole, OSError for what the disk refuses.
    """
    source, destination = Path(source), Path(destination)
    _check_apart(source, destination)
    wanted = plan(
        source,
        form,
        degree=degree,
        dtype=dtype,
        quantization=quantization,
        max_shard_bytes=max_shard_bytes,
        allow_absent=False,
    )
    with _alone_in(destination):
        record = _begin(wanted, destination)
        kept = len(record.files)
        if not record.complete:
            _check_space(wanted, destination, record)
            _write(wanted, destination, record, progress)
        if verify:
            _verify(wanted, destination, record, progress)
    targets = wanted.targets
    return Outcome(len(targets), sum(target.nbytes for target in targets), kept)


def _check_apart(source: Path, destination: Path) -> None:
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer:
        raise ConversionError(f"{destination} is the source itself: give another directory")
    if outer in inner.parents or inner in outer.parents:
        raise ConversionError(f"{source} and {destination} lie inside one another: give a directory beside the source")
    if destination.exists() and not destination.is_dir():
        raise ConversionError(f"{destination} is a file: give a new or an empty directory")


@contextmanager
def _alone_in(destination: Path) -> Iterator[None]:
    """Makes the directory; refuses when another conversion is writing into it."""
    try:
        destination.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(destination, os.O_RDONLY)
    except OSError as error:
        raise ConversionError(f"{destination} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another conversion is writing into {destination}: wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _begin(wanted: Plan, destination: Path) -> Record:
    """The record of this conversion, a new one or that of an interrupted run without what got lost."""
    record = Record.read(destination)
    if record is None:
        others = sorted(set(os.listdir(destination)) - {temporary(Path(RECORD_NAME)).name})
        if others:
            raise ConversionError(
                f"{destination} is not empty: it holds {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}; "
                "give a new or an empty directory"
            )
        published = None if wanted.form == HUGGINGFACE else wanted.source.published
        record = Record(wanted.form, wanted.digest, published)
        try:
            record.write(destination)
        except OSError as error:
            raise ConversionError(f"{destination} cannot be written: {error.strerror}") from error
        return record
    if record.plan != wanted.digest:
        state = "a finished" if record.complete else "an unfinished"
        raise ConversionError(
            f"{destination} holds {state} conversion from another source or with other options: repeat those, or give "
            "a new or an empty directory"
        )
    for target in wanted.targets:
        path = destination / target.file
        entry = record.files.get(target.file)
        if entry is not None and not _has_size(path, target.nbytes):
            if _has_size(temporary(path), target.nbytes):
                publish(path)  # the interruption came between the record's entry and this
            else:
                del record.files[target.file]
        if target.file not in record.files:
            temporary(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            record.complete = False
    if any(not (destination / file).is_file() for file in (*wanted.companions, *wanted.documents, *wanted.indexes)):
        record.complete = False
    return record


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _check_space(wanted: Plan, destination: Path, record: Record) -> None:
    missing = [target.nbytes for target in wanted.targets if target.file not in record.files]
    copied = [(wanted.source.directory / name).stat().st_size for name in wanted.companions]
    written = [len(content) for content in (*wanted.documents.values(), *wanted.indexes.values())]
    needed = sum(missing) + sum(copied) + sum(written) + SPARE_BYTES
    free = os.statvfs(destination)
    available = free.f_bavail * free.f_frsize
    if available < needed:
        raise ConversionError(
            f"{destination} has {available:,} bytes free, {needed:,} are needed for {len(missing)} files of weights: "
            "free some or give a directory on another disk"
        )


def _write(wanted: Plan, destination: Path, record: Record, progress: bool) -> None:
    """Everything that is not there yet; the indexes last, and the record complete only after them."""
    source = wanted.source.directory
    try:
        for name in wanted.companions:
            write_whole(destination / name, (source / name).read_bytes())
        for name, content in wanted.documents.items():
            write_whole(destination / name, content)
        write_shards(wanted, destination, record, progress)
        for name, content in wanted.indexes.items():
            write_whole(destination / name, content)
        record.complete = True
        record.write(destination)
    except OSError as error:
        record.complete = False
        raise OSError(
            f"writing to {destination} failed: {error.strerror or error}; {len(record.files)} of "
            f"{len(wanted.targets)} files of weights are finished and stay: run the same command again to go on"
        ) from error


def _verify(wanted: Plan, destination: Path, record: Record, progress: bool) -> None:
    """Strikes from the record what is damaged, so that the next run writes it again."""
    wrong = differing_shards(wanted, destination, record, progress)
    if not wrong:
        return
    for file in wrong:
        del record.files[file]
    record.complete = False
    record.write(destination)
    raise ConversionError(
        f"{destination} does not hold what was written:\n{summarise(wrong)}\n"
        "The disk may be failing; run the same command again to write these files anew."
    )
