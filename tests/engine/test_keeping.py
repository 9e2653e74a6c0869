"""Prefixes that come out of a store: answers are those of a cold engine, whatever happens to files and meanwhile."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate import Gate
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m.cache import PrefixStore, segment_file
from paddle_qwen1m.engine import Completion, Engine, Finished, PrefillProgress, Request, SamplingParams, TokenChosen
from paddle_qwen1m.engine.orders import Prefill
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.options import EngineOptions

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
PAGE, SEGMENT, CHUNK = 32, 64, 64
LENGTH = 400
"""Of every prompt, so that m is the same: DOCUMENT tokens that all have, and a question."""
DOCUMENT = 330
TOKEN_BYTES = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
MODES = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@pytest.fixture(scope="module")
def model() -> Qwen2OneM:
    return random_model(np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def prompt(question: int, length: int = LENGTH) -> np.ndarray:
    document = np.random.default_rng(1).integers(0, CONFIG.vocab_size, DOCUMENT)
    return np.concatenate([document, np.random.default_rng(question).integers(0, 90, length - DOCUMENT)])


def engine(
    model: Qwen2OneM, folder: Path | None, *, sparse: bool = False, weights: str = "w", **options: Any
) -> Engine:
    chosen: dict[str, Any] = {
        "max_num_batched_tokens": CHUNK,
        "page_size": PAGE,
        "cache_tokens": 2048,
        "sparse": sparse,
        "sparse_threshold": 100,
        "prefix_border_parts": 2,
        "prefix_temperature_tolerance": 0.0,
        "enable_prefix_caching": True,
        "prefix_store_min_tokens": SEGMENT,
        **options,
    }
    if folder is not None:
        chosen["prefix_store"] = str(folder)
    return Engine(model, EngineOptions(**chosen), BUDGETS if sparse else None, weights=weights)


def ask(one: Engine, question: int, length: int = LENGTH, params: SamplingParams = GREEDY) -> tuple[Completion, int]:
    """The answer, and how many tokens of the prompt came out of the store."""
    progress: list[PrefillProgress] = []
    (completion,) = one.generate([prompt(question, length)], params, on_prefill=progress.append)
    return completion, progress[-1].restored_tokens


def fill(model: Qwen2OneM, folder: Path, question: int = 2, **options: Any) -> None:
    """A process that reads the document, and ends."""
    one = engine(model, folder, **options)
    assert ask(one, question)[1] == 0
    one.close()


def files(folder: Path) -> list[Path]:
    """By the tokens that they hold the keys of."""

    def begin(path: Path) -> int:
        with segment_file.SegmentReader(path) as reader:
            return int(reader.header["begin"])

    return sorted(folder.glob("*/*.kv"), key=begin)


def cold(model: Qwen2OneM, question: int, *, sparse: bool = False, length: int = LENGTH) -> Completion:
    return ask(engine(model, None, sparse=sparse), question, length)[0]


def run(one: Engine) -> dict[str, Completion]:
    done = {}
    while not one.is_idle:
        done.update({event.id: event.completions[0] for event in one.step() if isinstance(event, Finished)})
    return done


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, segment_file.SegmentReader, "read")
    yield gate
    gate.open()


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, segment_file.SegmentWriter, "write")
    yield gate
    gate.open()


@MODES
def test_another_engine_answers_as_a_cold_one_and_computes_what_is_not_kept(
    model: Qwen2OneM, folder: Path, sparse: bool
) -> None:
    fill(model, folder, sparse=sparse)
    one = engine(model, folder, sparse=sparse)
    answer, restored = ask(one, 3)
    assert answer == cold(model, 3, sparse=sparse)
    # dense: whole segments of the document. Sparse: up to the last border before the question
    assert restored == (DOCUMENT // SEGMENT * SEGMENT if not sparse else 320)
    metrics = one.metrics
    assert (metrics.store_hits, metrics.store_tokens, metrics.prefix_reused_tokens) == (1, restored, restored)
    assert metrics.store_read_bytes == restored * TOKEN_BYTES
    assert metrics.store_read_seconds > 0
    assert ask(one, 4)[1] == 0 and one.metrics.prefix_reused_tokens >= 2 * restored, "it is in the cache now"


@MODES
def test_what_is_restored_goes_on_from_what_is_cached(model: Qwen2OneM, folder: Path, sparse: bool) -> None:
    """A prompt that leaves the document after 230 tokens was there first: 224 of them are whole pages, 192 segments."""
    fill(model, folder, sparse=sparse)
    other = np.concatenate([prompt(2)[:230], prompt(2)[: LENGTH - 230]])
    one = engine(model, folder, sparse=sparse)
    one.generate([other], GREEDY)
    assert one.metrics.store_tokens == 192
    answer, restored = ask(one, 3)
    assert answer == cold(model, 3, sparse=sparse)
    assert restored == 320 - (192 if sparse else 224)


def test_few_tokens_behind_what_is_restored_are_a_short_prompt(
    model: Qwen2OneM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read whole, where the document's tokens were not."""
    fill(model, folder)
    one = engine(model, folder, max_num_batched_tokens=2 * CHUNK)
    run_order, points = one.runner.run, []

    def watched(order: Any, *rest: Any) -> Any:
        points.extend([order.points] if isinstance(order, Prefill) else [])
        return run_order(order, *rest)

    monkeypatch.setattr(one.runner, "run", watched)
    assert ask(one, 3)[1] == DOCUMENT // SEGMENT * SEGMENT
    assert points and not any(points)
    points.clear()
    one.generate([prompt(4)[1:]], GREEDY)
    assert points and all(points)


def test_a_prompt_below_the_least_length_is_not_kept(model: Qwen2OneM, folder: Path) -> None:
    fill(model, folder, prefix_store_min_tokens=LENGTH)
    assert files(folder) == []
    assert engine(model, folder).metrics.store_written_bytes == 0


def test_what_is_kept_is_not_written_again(model: Qwen2OneM, folder: Path) -> None:
    fill(model, folder)
    before = {path: path.stat().st_ino for path in files(folder)}
    one = engine(model, folder)
    ask(one, 3)
    one.close()
    after = {path: path.stat().st_ino for path in files(folder)}
    assert before.items() <= after.items() and len(after) == len(before) + 1, "the one with the question in it is new"
    assert one.metrics.store_written_bytes == SEGMENT * TOKEN_BYTES


@pytest.mark.parametrize("kind", ["dtype", "weights", "salt", "budgets", "chunks", "mode"])
def test_keys_made_in_another_way_are_not_used(
    model: Qwen2OneM, folder: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(model, folder, sparse=True)
    options: dict[str, Any] = {"sparse": True}
    told = ""
    if kind == "dtype":
        options["kv_cache_dtype"], told = "bfloat16", "cache_dtype float32, here bfloat16"
    elif kind == "weights":
        options["weights"], told = "others", "weights w, here others"
    elif kind == "mode":
        options["sparse"], told = False, "prefill sparse, here dense"
    elif kind == "chunks":
        options["max_num_batched_tokens"] = 96
    one = engine(model, folder, **options)
    if kind == "budgets":
        fewer = type(BUDGETS)(BUDGETS.vertical // 2, BUDGETS.slash)
        one.configure(one.options, fewer)
        told = "sparsebudgets "
    request = Request("r", prompt(3), GREEDY, cache_salt="mine" if kind == "salt" else "")
    with caplog.at_level(logging.WARNING):
        one.add(request)
        run(one)
    assert one.metrics.store_tokens == 0
    assert told in caplog.text and (told != "" or "kept" not in caplog.text)


def test_a_prefix_that_another_m_was_used_for_serves_within_the_tolerance_alone(model: Qwen2OneM, folder: Path) -> None:
    fill(model, folder)
    assert ask(engine(model, folder), 3, LENGTH + 1)[1] == 0, "original_max_position_embeddings is exceeded"
    tolerant = engine(model, folder, prefix_temperature_tolerance=0.01)
    assert ask(tolerant, 4, LENGTH + 2)[1] == 320
    assert tolerant.metrics.prefix_reused_tokens == 320


@MODES
def test_behind_a_damaged_file_everything_is_computed_and_it_is_written_again(
    model: Qwen2OneM, folder: Path, sparse: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(model, folder, sparse=sparse)
    damaged = files(folder)[2]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:70_000] + bytes([whole[70_000] ^ 1]) + whole[70_001:])
    one = engine(model, folder, sparse=sparse)
    with caplog.at_level(logging.WARNING):
        answer, restored = ask(one, 3)
    assert answer == cold(model, 3, sparse=sparse)
    assert restored == 2 * SEGMENT
    assert f"{damaged} is removed: block 0 of 1 is damaged" in caplog.text.replace("\n", "")
    one.close()
    assert damaged.read_bytes() == whole
    assert ask(engine(model, folder, sparse=sparse), 4)[1] >= 4 * SEGMENT


def test_others_go_on_while_a_prefix_is_restored(model: Qwen2OneM, folder: Path, reading: Gate) -> None:
    fill(model, folder)
    one = engine(model, folder)
    one.add(Request("slow", prompt(3), GREEDY))
    while not reading.reached.is_set():
        one.step()
    one.add(Request("other", prompt(5)[-50:], GREEDY))
    done: dict[str, Completion] = {}
    while "other" not in done:
        done.update({event.id: event.completions[0] for event in one.step() if isinstance(event, Finished)})
    assert one.metrics.waiting == 1
    reading.open()
    assert run(one)["slow"] == cold(model, 3)


def test_who_has_the_same_prefix_waits_for_the_one_that_is_restored(
    model: Qwen2OneM, folder: Path, reading: Gate
) -> None:
    fill(model, folder)
    one = engine(model, folder)
    for question in (3, 4):
        one.add(Request(str(question), prompt(question), GREEDY))
    while not reading.reached.is_set():
        one.step()
    one.step()
    reading.open()
    done = run(one)
    assert done == {str(question): cold(model, question) for question in (3, 4)}
    assert (one.metrics.store_hits, one.metrics.prefix_reused_tokens) == (1, 2 * 320)


def test_a_request_that_is_dropped_while_it_is_restored_holds_nothing(
    model: Qwen2OneM, folder: Path, reading: Gate
) -> None:
    fill(model, folder)
    one = engine(model, folder, max_num_seqs=1)
    one.add(Request("dropped", prompt(3), GREEDY))
    while not reading.reached.is_set():
        one.step()
    assert one.metrics.pages_held > 0
    assert one.abort("dropped") and one.is_idle
    assert one.metrics.pages_held == 0
    one.add(Request("next", prompt(4)[::-1].copy(), GREEDY))  # takes the same pages
    reading.open()
    done = run(one)["next"]
    assert done == engine(model, None).generate([prompt(4)[::-1].copy()], GREEDY)[0]


def test_a_write_is_given_up_when_its_pages_are_needed(model: Qwen2OneM, folder: Path, writing: Gate) -> None:
    one = engine(model, folder, cache_tokens=512)
    first, _ = ask(one, 2)
    assert first == cold(model, 2)
    assert writing.reached.wait(20) and one.metrics.pages_held > 0
    answered = threading.Event()

    def open_later() -> None:
        time.sleep(0.2)
        writing.open()

    threading.Thread(target=open_later).start()
    other = prompt(6)[::-1].copy()
    (answer,) = one.generate([other], GREEDY)
    answered.set()
    assert answer == engine(model, None).generate([other], GREEDY)[0]
    one.close()
    assert one.metrics.pages_held == 0
    kept = PrefixStore(folder)
    assert not list(kept.directory.glob("*/*.part"))
    assert ask(engine(model, folder), 3)[0] == cold(model, 3)


def test_an_answer_does_not_wait_for_the_write(model: Qwen2OneM, folder: Path, writing: Gate) -> None:
    one = engine(model, folder)
    one.add(Request("r", prompt(2), SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)))
    tokens = 0
    while not one.is_idle:
        tokens += sum(isinstance(event, TokenChosen) for event in one.step())
    assert tokens == 30 and writing.reached.wait(20) and files(folder) == []
    writing.open()
    one.finish_writes()
    assert len(files(folder)) == LENGTH // SEGMENT


def test_a_folder_that_takes_no_more_is_named_and_nothing_else_happens(
    model: Qwen2OneM, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_file.os, "posix_fallocate", full)
    one = engine(model, folder)
    with caplog.at_level(logging.WARNING):
        assert ask(one, 2)[0] == cold(model, 2)
        one.close()
    assert caplog.text.count(f"{folder} takes no more: No space left on device") == 1
    assert list(folder.glob("*/*")) == []


def test_the_limit_is_kept_by_giving_up_what_was_used_least_recently(model: Qwen2OneM, folder: Path) -> None:
    fill(model, folder)
    size = sum(path.stat().st_size for path in files(folder))
    one = engine(model, folder, prefix_store_size=size)
    other = prompt(7)[::-1].copy()
    one.generate([other], GREEDY)
    one.close()
    assert sum(path.stat().st_size for path in files(folder)) <= size
    assert ask(engine(model, folder), 3)[1] == 0
    again = engine(model, folder)
    progress: list[PrefillProgress] = []
    again.generate([other], GREEDY, on_prefill=progress.append)
    assert progress[-1].restored_tokens == LENGTH // SEGMENT * SEGMENT


def test_a_store_needs_a_cache_and_a_name_for_the_weights(model: Qwen2OneM, folder: Path) -> None:
    with pytest.raises(ValueError, match="prefix_store needs enable_prefix_caching=True"):
        EngineOptions(prefix_store=str(folder))
    with pytest.raises(ValueError, match="prefix_store needs a name for the weights"):
        engine(model, folder, weights="")


def test_a_folder_that_is_gone_costs_no_answer(model: Qwen2OneM, folder: Path) -> None:
    fill(model, folder)
    one = engine(model, folder)
    shutil.rmtree(folder)
    assert ask(one, 3) == (cold(model, 3), 0)
    one.close()
