"""Segments on their way: whole pages there and back, nothing touched that was given up, no error that is lost."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate import Gate
from small_model import CONFIG

from paddle_qwen1m import ops
from paddle_qwen1m.cache import M2Range, PagedCache, PrefixStore, SegmentPages, StoredSegment, Transfers, transfers
from paddle_qwen1m.cache.kv_scales import KVScales
from paddle_qwen1m.cache.segment_file import SegmentReader, SegmentWriter
from paddle_qwen1m.cache.store import segment_name
from paddle_qwen1m.cache.transfers import UNFINISHED

PAGE, PAGES, SEGMENT = 16, 24, 64
PER_SEGMENT = SEGMENT // PAGE
BLOCK_PIECES = 3
"""Of a file's blocks: the 16 pieces of a segment are no multiple of it."""


@pytest.fixture(params=["float32", "bfloat16", "int8", "fp8", "int8 but the last layer"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(dtype: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> PagedCache:
    wide = (CONFIG.num_layers - 1,) if "last" in dtype else ()
    made = PagedCache(CONFIG, PAGES, PAGE, dtype.split()[0], replace(KVScales.none(CONFIG), in_16_bits=wide))
    for layer in made.layers:
        for tensor in (layer.keys, layer.values, *(layer.quantised or ())[:1]):
            random = ops.tensor((30 * rng.standard_normal(tensor.shape)).astype(np.float32))
            tensor.copy_(random.astype(tensor.dtype), False)
    monkeypatch.setattr(transfers, "BLOCK_BYTES", BLOCK_PIECES * made.piece_bytes + 1)
    return made


@pytest.fixture
def kept(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store")


@pytest.fixture
def moving(kept: PrefixStore, cache: PagedCache) -> Iterator[Transfers]:
    one = Transfers(kept, cache, gpu=False)
    yield one
    one.finish()


def memory(cache: PagedCache) -> np.ndarray:
    """What is in all pages: uint8 [1, pages, bytes of a page]."""
    return np.concatenate(pieces(cache), axis=1)[None]


def pieces(cache: PagedCache) -> list[np.ndarray]:
    """The same, a piece of every page after the other, as a file has them: uint8 [pages, bytes of it] each."""
    keys = [tensor.numpy() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    scales = [scale for layer in cache.layers if layer.quantised for scale in layer.quantised.scales.numpy()]
    return sorted((one.reshape(PAGES, -1).view(np.uint8) for one in (*keys, *scales)), key=lambda one: -one.shape[1])


def segments(count: int) -> list[StoredSegment]:
    def name() -> str:
        return segment_name(secrets.token_hex(16), secrets.token_hex(16), M2Range(1.0, 1.0))

    return [StoredSegment(name(), SEGMENT * number, SEGMENT * (number + 1)) for number in range(count)]


def transfer(segments: list[StoredSegment], pages: Any, first: int = 0, **how: Any) -> dict[str, Any]:
    """Arguments of Transfers.begin."""
    what = SegmentPages(tuple(segments), tuple(pages), first, document="d", made_under="{}", queued=1000.0)
    return {"what": what, "ready": int, **how}


def saved(moving: Transfers, count: int, number: int = 1000) -> list[StoredSegment]:
    """Segments of the first pages, which are in the store now."""
    what = segments(count)
    moving.begin(number, **transfer(what, range(PER_SEGMENT * count), writes=True))
    moving.finish()
    assert moving.state(number) == count
    return what


def test_other_pages_hold_what_was_saved(moving: Transfers, cache: PagedCache) -> None:
    before, pages = memory(cache), [21, 8, 19, 10, 17, 12, 15, 14]
    what = saved(moving, 2)
    moving.begin(1, **transfer(what, pages, writes=False))
    moving.finish()
    assert moving.state(1) == 2
    assert moving.bytes_of(1) == moving.bytes_of(1000) == before[:, :8].nbytes
    expected = before.copy()
    expected[:, pages] = before[:, :8]
    np.testing.assert_array_equal(memory(cache), expected)


def test_the_file_holds_a_layers_keys_then_its_values_smaller_pieces_last(
    moving: Transfers, cache: PagedCache, kept: PrefixStore, dtype: str
) -> None:
    (segment,) = saved(moving, 1)
    data = kept.path(segment.name).read_bytes()[1 << 16 :]
    assert data.startswith(b"".join(piece[:PER_SEGMENT].tobytes() for piece in pieces(cache)))
    with SegmentReader(kept.path(segment.name)) as reader:
        header = reader.header
    assert header["shape"] == [CONFIG.num_layers, 2, CONFIG.num_kv_heads, CONFIG.head_dim]
    assert (header["dtype"], header["begin"], header["end"]) == (dtype.split()[0], 0, SEGMENT)
    assert header["block_bytes"] == BLOCK_PIECES * cache.piece_bytes


@pytest.mark.parametrize("first", [PAGE, SEGMENT - PAGE, SEGMENT, SEGMENT + 2 * PAGE])
def test_pages_before_the_first_are_left_alone(moving: Transfers, cache: PagedCache, first: int) -> None:
    before = memory(cache)
    what = [segment for segment in saved(moving, 2) if segment.end > first]
    absent = first // PAGE
    pages = range(8 + absent, 16)
    moving.begin(1, **transfer(what, pages, first, writes=False))
    moving.finish()
    assert moving.state(1) == len(what)
    expected = before.copy()
    expected[:, pages] = before[:, absent:8]
    np.testing.assert_array_equal(memory(cache), expected)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_what_is_before_a_bad_segment_is_whole(
    moving: Transfers, cache: PagedCache, kept: PrefixStore, how: str
) -> None:
    before, what = memory(cache), saved(moving, 3)
    path = kept.path(what[1].name)
    content = bytearray(path.read_bytes())
    content[(1 << 16) + 4 * BLOCK_PIECES * cache.piece_bytes] ^= 1
    path.unlink() if how == "missing" else path.write_bytes(content)
    moving.begin(1, **transfer(what, range(12, 24), writes=False))
    moving.finish()
    assert moving.state(1) == 1 and not path.exists()
    now = memory(cache)
    np.testing.assert_array_equal(now[:, 12:16], before[:, :4])
    np.testing.assert_array_equal(now[:, 20:], before[:, 20:])
    np.testing.assert_array_equal(now[:, :12], before[:, :12])


@pytest.mark.parametrize("writes", [False, True], ids=["restore", "save"])
def test_no_page_is_touched_behind_giving_up(
    moving: Transfers, cache: PagedCache, kept: PrefixStore, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = segments(2) if writes else saved(moving, 2)
    used: list[str] = []
    for direction in ("gather", "scatter"):
        original = getattr(ops.PieceBuffer, direction)

        def noted(this: Any, *arguments: Any, original: Any = original, direction: str = direction) -> None:
            used.append(direction)
            original(this, *arguments)

        monkeypatch.setattr(ops.PieceBuffer, direction, noted)
    gate = Gate(monkeypatch, SegmentWriter if writes else SegmentReader, "write" if writes else "read")
    moving.begin(1, **transfer(what, range(8, 16), writes=writes))
    other = segments(1) if writes else what
    moving.begin(2, **transfer(other, range(16, 24), writes=writes, ready=lambda: used.append("begun")))
    assert gate.reached.wait(20)
    before = list(used)
    moving.give_up(1)
    moving.give_up(2)
    gate.open()
    moving.finish()
    assert used == before == (["gather"] if writes else []), "the second one has not begun"
    if writes:
        assert not [path for path in kept.directory.rglob("*") if path.is_file()]


def test_giving_up_waits_for_the_copy_that_goes_on(moving: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    what = saved(moving, 1)
    gate = Gate(monkeypatch, ops.PieceBuffer, "scatter")
    moving.begin(1, **transfer(what, range(8, 12), writes=False))
    assert gate.reached.wait(20)
    gone = threading.Event()
    threading.Thread(target=lambda: (moving.give_up(1), gone.set())).start()
    assert not gone.wait(0.1)
    gate.open()
    assert gone.wait(20)


def test_a_write_begins_when_the_device_is_ready_and_a_restore_does_not_wait_for_it(
    moving: Transfers, cache: PagedCache, kept: PrefixStore
) -> None:
    there = saved(moving, 1)
    ready, new = threading.Event(), segments(2)
    moving.begin(1, **transfer(new, range(8), writes=True, ready=lambda: ready.wait(20)))
    moving.begin(2, **transfer(there, range(8, 12), writes=False))
    while moving.state(2) == UNFINISHED:
        moving.wait(20)
    assert moving.state(2) == 1 and moving.state(1) == UNFINISHED
    assert not kept.path(new[0].name).exists()
    ready.set()
    moving.finish()
    assert moving.state(1) == 2 and kept.path(new[1].name).exists()


def test_transfers_of_a_kind_keep_their_order(moving: Transfers, cache: PagedCache) -> None:
    """The second one restores other segments to the same pages."""
    before, (one, other) = memory(cache), saved(moving, 2)
    gone, order = threading.Event(), []
    for number, segment in enumerate((one, other)):
        alone = [StoredSegment(segment.name, segment.begin, segment.end)]
        note = [lambda: gone.wait(20) and order.append(0), lambda: order.append(1)][number]
        moving.begin(number, **transfer(alone, range(20, 24), segment.begin, writes=False, ready=note))
    gone.set()
    moving.finish()
    assert order == [0, 1] and [moving.state(number) for number in (0, 1)] == [1, 1]
    np.testing.assert_array_equal(memory(cache)[:, 20:], before[:, 4:8])


def test_finish_waits_for_everything(moving: Transfers, kept: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SegmentWriter.write

    def slow(this: SegmentWriter, block: np.ndarray) -> None:
        time.sleep(0.01)
        write(this, block)

    monkeypatch.setattr(SegmentWriter, "write", slow)
    what = segments(4)
    for number in range(4):
        pages = range(4 * number, 4 * number + 4)
        moving.begin(number, **transfer(what[number : number + 1], pages, SEGMENT * number, writes=True))
    moving.finish()
    assert all(kept.path(segment.name).exists() for segment in what)
    assert [moving.state(number) for number in range(4)] == [1] * 4


def test_wait_tells_of_an_end_once(moving: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that came before it was asked; with nothing new it takes its time."""
    saved(moving, 1)
    began = time.perf_counter()
    moving.wait(20)
    assert time.perf_counter() - began < 10
    moving.wait(0.05)
    assert time.perf_counter() - began >= 0.05


@pytest.mark.parametrize("what", ["device", "copy", "reader"])
@pytest.mark.parametrize("writes", [False, True], ids=["restore", "save"])
def test_an_error_ends_a_transfer_is_told_and_the_next_one_goes_on(
    moving: Transfers,
    kept: PrefixStore,
    writes: bool,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("paddle_qwen1m"), "propagate", True)
    monkeypatch.setattr(transfers.logger, "propagate", True)
    there = saved(moving, 1)

    def fail(*_arguments: Any) -> None:
        raise RuntimeError("the GPU stopped")

    with monkeypatch.context() as patch:
        if what == "copy":
            patch.setattr(ops.PieceBuffer, "gather" if writes else "scatter", fail)
        elif what == "reader":
            patch.setattr(SegmentWriter if writes else SegmentReader, "write" if writes else "read", fail)
        ready = fail if what == "device" else int
        moving.begin(1, **transfer(segments(1) if writes else there, range(8, 12), writes=writes, ready=ready))
        moving.finish()
    assert moving.state(1) == 0 and "a transfer failed" in caplog.text and "the GPU stopped" in caplog.text
    assert len([path for path in kept.directory.rglob("*") if path.is_file()]) == 1
    moving.begin(2, **transfer(segments(1) if writes else there, range(8, 12), writes=writes))
    moving.finish()
    assert moving.state(2) == 1


def test_what_is_there_is_not_written_again_and_counts(moving: Transfers, kept: PrefixStore) -> None:
    what = saved(moving, 2)
    before = [kept.path(segment.name).stat() for segment in what]
    assert [status.st_mtime for status in before] == pytest.approx([1000.0, 1000.0 - 1e-3], abs=1e-5)
    moving.begin(1, **transfer(what, range(8), writes=True))
    moving.finish()
    assert moving.state(1) == 2 and moving.bytes_of(1) == 0
    assert [kept.path(segment.name).stat().st_ino for segment in what] == [status.st_ino for status in before]


def test_what_was_restored_was_used_now(moving: Transfers, kept: PrefixStore) -> None:
    what, began = saved(moving, 2), time.time()
    moving.begin(1, **transfer(what, range(8, 16), writes=False))
    moving.finish()
    first, second = (kept.path(segment.name).stat().st_mtime for segment in what)
    assert first > second > began - 0.1
