"""The converter on a disk that fails: whatever write, sync or rename it is, no file has its name before it is whole."""

from __future__ import annotations

import errno
import filecmp
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest
from synthetic_checkpoint import write_checkpoint
from test_convert_interrupted import FORMS, converted, identical, mounted

from paddle_qwen1m.weights import convert as converting
from paddle_qwen1m.weights.record import Record

MB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """About 1 MB in 3 shards."""
    shapes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return write_checkpoint(tmp_path / "source", 3, num_hidden_layers=2, vocab_size=512, **shapes)


def assert_nothing_unfinished(out: Path, expected: Path) -> None:
    """Every name is that of a whole file, and nothing looks like a whole conversion that is none."""
    assert not list(out.rglob("*.part"))
    finished, whole = (
        {path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")} for root in (out, expected)
    )
    assert finished == whole or not list(out.rglob("*.index.json"))
    for name in finished:
        assert filecmp.cmp(out / name, expected / name, shallow=False), name
    record = Record.read(out)
    assert record is None or not record.complete or finished == set(record.files)


def fails_then_goes_on(
    small: Path, out: Path, form: str, expected: Path, failing: Any, still_failing: bool = False
) -> bool:
    """Whether the conversion failed while `failing` was in force; without it, it ends as if nothing had been.

    The record names finished files alone, unless it cannot be written any more either.
    """
    try:
        with failing:
            converted(small, out, FORMS[form])
        failed = False
    except (OSError, converting.ConversionError):
        failed = True
        assert_nothing_unfinished(out, expected)
        record = Record.read(out)
        assert still_failing or record is None or all((out / file).exists() for file in record.files)
    converted(small, out, FORMS[form])
    identical(out, expected)
    return failed


@contextmanager
def replaced(name: str, call: Callable[..., Any]) -> Iterator[None]:
    """`os.name` is `call`, which gets the number of the call and the real function before the arguments."""
    real, count = getattr(os, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return call(count, real, *arguments, **options)

    setattr(os, name, counted)
    try:
        yield
    finally:
        setattr(os, name, real)


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
@pytest.mark.parametrize("form", FORMS)
def test_any_single_call_may_fail(small: Path, tmp_path: Path, form: str, name: str) -> None:
    expected = converted(small, tmp_path / "expected", FORMS[form])
    which, step = 1, 1 if form == "huggingface" else 5

    def fail_one(count: int, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if count == which:
            code = (errno.ENOSPC, errno.EIO)[which % 2]
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    while fails_then_goes_on(small, tmp_path / f"at {which}", form, expected, replaced(name, fail_one)):
        which += step
    assert which > 6


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_nothing_works_from_some_call_on(small: Path, tmp_path: Path, name: str) -> None:
    expected = converted(small, tmp_path / "expected", FORMS["huggingface"])
    which = 1

    def fail_from(count: int, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if count >= which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    while fails_then_goes_on(small, tmp_path / f"at {which}", "huggingface", expected, replaced(name, fail_from), True):
        which += 1
    assert which > 6


def test_a_write_may_take_less_than_it_was_given(small: Path, tmp_path: Path) -> None:
    expected = converted(small, tmp_path / "expected", FORMS["paddlenlp"])

    def short(count: int, real: Callable[..., Any], descriptor: int, data: Any) -> Any:
        return real(descriptor, data[: 1 + count * 997 % max(1, len(data))])

    with replaced("write", short):
        converted(small, tmp_path / "out", FORMS["paddlenlp"])
    identical(tmp_path / "out", expected)


def test_a_write_that_takes_nothing_is_an_error(small: Path, tmp_path: Path) -> None:
    expected = converted(small, tmp_path / "expected", FORMS["huggingface"])
    nothing = replaced("write", lambda count, real, *arguments: 0 if count > 4 else real(*arguments))
    assert fails_then_goes_on(small, tmp_path / "out", "huggingface", expected, nothing)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("form", FORMS)
def test_no_file_may_grow_beyond_a_size(small: Path, tmp_path: Path, form: str) -> None:
    """At sizes all over the files, their first and last bytes included."""
    expected = converted(small, tmp_path / "expected", FORMS[form])
    sizes = sorted(path.stat().st_size for path in expected.rglob("*.safetensors"))
    limits = {size - 1 for size in sizes} | {1, 9, 5000, sizes[0] // 2, sizes[-1] // 2, sizes[-1] // 3 * 2}
    for limit in sorted(limits):
        assert fails_then_goes_on(small, tmp_path / f"to {limit}", form, expected, largest_file(limit))


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_of_any_size_too_small(small: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = converted(small, tmp_path / "expected", FORMS[form])
    total = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    for number, size in enumerate(range(64 << 10, total - (64 << 10), 172 << 10)):
        with mounted(tmp_path / f"disk {number}", str(size)):
            out = tmp_path / f"disk {number}" / "out"
            with monkeypatch.context() as patch, pytest.raises((OSError, converting.ConversionError)):
                patch.setattr(converting, "_check_space", lambda *_: None)
                converted(small, out, FORMS[form])
            if out.exists():
                assert_nothing_unfinished(out, expected)
