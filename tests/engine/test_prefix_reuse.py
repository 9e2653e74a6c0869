"""Prefixes on a trained model: what is reused, what is computed, and that answers are those of a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needle_documents import Document, DocumentMaker, Needle, is_answer, prompt_head, prompt_tail
from needle_subject import Subject

from paddle_qwen1m.engine import Engine, Finished, Logits, Prefilled, Request, SamplingParams, TokenChosen

PAGE = 256
CHUNK = 2048
PART = CHUNK // 8
FULL = 1536
"""Tokens of a chunk that another one follows: two of DCA's own."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
MODES = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@dataclass
class Answered:
    """seconds: to the first token. logits: after the positions that were asked for."""

    tokens: list[int]
    computed: int
    seconds: float
    logits: np.ndarray | None = None


def ask(engine: Engine, prompt: np.ndarray, positions: tuple[int, ...] = ()) -> Answered:
    engine.add(Request("asked", prompt, GREEDY, logit_positions=positions))
    start, first, computed = time.perf_counter(), 0.0, 0
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, TokenChosen):
                first = first or time.perf_counter() - start
            elif isinstance(event, Prefilled):
                computed = event.total_tokens - event.reused_tokens
            elif isinstance(event, Logits):
                logits.append(event.values)
            elif isinstance(event, Finished):
                tokens = event.completions[0].token_ids
    return Answered(tokens, computed, first, np.concatenate(logits) if logits else None)


class Reader:
    """Documents of a subject, questions about them as prompts, and engines that read them sparsely or not."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self._maker = subject, DocumentMaker(subject.encode)

    def document(self, tokens: int, needles: int, seed: int) -> tuple[np.ndarray, Document]:
        """Everything before a question: int64 [about `tokens`]."""
        document = self._maker.make(tokens, needles, seed)
        return np.asarray(self.subject.encode(prompt_head()) + self._maker.ids(document), np.int64), document

    def question(self, needle: Needle) -> np.ndarray:
        return np.asarray(self.subject.encode(prompt_tail(needle)), np.int64)

    def filler(self, tokens: int) -> np.ndarray:
        """So many tokens of a text that says nothing."""
        return np.asarray((self.subject.encode(" The grass is green.") * tokens)[:tokens], np.int64)

    def engine(self, *, sparse: bool, warm: bool = True, **options: Any) -> Engine:
        options = {"sparse_threshold": 1024, "prefix_temperature_tolerance": 0.0, **options}
        return self.subject.engine(sparse=sparse, enable_prefix_caching=warm, max_num_batched_tokens=CHUNK, **options)

    def text(self, tokens: list[int]) -> str:
        text: str = self.subject.tokenizer.decode(tokens, skip_special_tokens=False)
        return text.split("<|im_end|>")[0]


@pytest.fixture(scope="module")
def needle(needle_checkpoint: Path) -> Iterator[Reader]:
    """The checkpoint: m depends on the length."""
    yield Reader(Subject(needle_checkpoint, always=False))


@pytest.fixture(scope="module")
def copy(needle_checkpoint: Path) -> Iterator[Reader]:
    """The copy: m is 1."""
    yield Reader(Subject(needle_checkpoint, always=True))


def pair_of_equal_length(reader: Reader, document: Document) -> tuple[np.ndarray, np.ndarray]:
    """Different questions of as many tokens."""
    questions = [reader.question(needle) for needle in document.needles]
    for number, one in enumerate(questions):
        for other in questions[number + 1 :]:
            if len(one) == len(other):
                return one, other
    raise AssertionError("no two questions are equally long")


@MODES
def test_a_question_of_equal_length_on_the_needle_gets_what_a_cold_cache_gives(needle: Reader, sparse: bool) -> None:
    start, document = needle.document(2600, 8, 1)
    one, other = pair_of_equal_length(needle, document)
    warm, cold = needle.engine(sparse=sparse, cache_tokens=8192), needle.engine(sparse=sparse, warm=False)
    ask(warm, np.concatenate([start, one]))
    again, alone = (ask(engine, np.concatenate([start, other])) for engine in (warm, cold))
    assert again.computed <= len(other) + PART and alone.computed == len(start) + len(other)
    assert again.tokens == alone.tokens
    longer = np.concatenate([start, needle.filler(30), other])
    assert ask(warm, longer).computed == len(longer), "m differs, and tolerance 0 is strict"


@MODES
def test_a_question_of_any_length_on_the_copy_gets_what_a_cold_cache_gives(copy: Reader, sparse: bool) -> None:
    start, document = copy.document(2600, 2, 2)
    one, other = (copy.question(needle) for needle in document.needles)
    warm, cold = copy.engine(sparse=sparse, cache_tokens=8192), copy.engine(sparse=sparse, warm=False)
    ask(warm, np.concatenate([start, one]))
    for more in (7, 150):
        asked = np.concatenate([start, copy.filler(more), other])
        again = ask(warm, asked)
        assert again.computed <= more + len(other) + PART
        assert again.tokens == ask(cold, asked).tokens


def filled(length: int) -> int:
    """How many chunks a prompt has before its last one."""
    return max(0, (length - CHUNK) // FULL + 1)


def test_a_pair_of_questions_across_a_chunks_end_computes_that_chunk_anew_once(copy: Reader) -> None:
    start, document = copy.document(3000, 2, 3)
    one, other = (copy.question(needle) for needle in document.needles)
    warm, cold = copy.engine(sparse=True, cache_tokens=16384), copy.engine(sparse=True, warm=False)
    prompts = [np.concatenate([start, copy.filler(more), other]) for more in (700, 750)]
    assert filled(len(start) + len(one)) == 1 and [filled(len(prompt)) for prompt in prompts] == [2, 2]
    ask(warm, np.concatenate([start, one]))
    first, second = (ask(warm, prompt) for prompt in prompts)
    assert warm.metrics.prefix_recut_tokens == len(start) // PAGE * PAGE - FULL
    assert first.computed == len(prompts[0]) - FULL
    assert second.computed <= 50 + len(other) + PART
    for got, prompt in zip((first, second), prompts):
        assert got.tokens == ask(cold, prompt).tokens


@MODES
def test_ten_turns_of_a_chat_compute_what_is_new(copy: Reader, sparse: bool) -> None:
    """Dense: the new text and the last page. Sparse: the last answer too, at most a part, and each chunk once more when
    it is filled.
    """
    warm, cold = copy.engine(sparse=sparse, cache_tokens=16384), copy.engine(sparse=sparse, warm=False)
    said, answer, chunks, fillings = np.empty(0, np.int64), np.empty(0, np.int64), 0, 0
    for turn in range(10):
        text, document = copy.document(1800 if turn == 0 else 240, 2, 10 + turn)
        new = np.concatenate([text, copy.question(document.needles[0])])
        said = np.concatenate([said, answer, new])
        got = ask(warm, said)
        fills = filled(len(said)) - chunks
        chunks, fillings = chunks + fills, fillings + (fills > 0)
        if turn == 0:
            assert got.computed == len(said)
        elif sparse:
            assert got.computed <= len(new) + len(answer) + PART + fills * CHUNK
            assert got.computed > FULL or not fills
        else:
            assert got.computed <= len(new) + PAGE
        if turn == 9 or fills:
            assert got.tokens == ask(cold, said).tokens
        answer = np.asarray(got.tokens, np.int64)
    assert fillings == 2


def test_eviction_under_pressure_keeps_answers_right(copy: Reader) -> None:
    """Questions about three documents in turn, in a cache that holds two."""
    documents = [copy.document(1200, 3, 30 + number) for number in range(3)]
    warm = copy.engine(sparse=True, cache_tokens=11 * PAGE)
    reused = 0
    for number in (0, 1, 1, 2, 0, 0, 1, 2, 2):
        start, document = documents[number]
        asked = document.needles[reused % 3]
        got = ask(warm, np.concatenate([start, copy.question(asked)]))
        assert is_answer(copy.text(got.tokens), asked)
        reused += got.computed < len(start)
    assert warm.pool.available == 11 and reused >= 3


@pytest.mark.slow
@MODES
def test_where_m_differs_within_the_tolerance_logits_hardly_do(
    needle: Reader, sparse: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """m^2 of a prompt that goes on a little further than an earlier one."""
    temperature = needle.subject.model.config.dual_chunk.temperature
    start, document = needle.document(4000, 2, 4)
    one, other = (needle.question(needle_) for needle_ in document.needles)
    first = np.concatenate([start, one])
    for difference, logit in ((5e-5, 0.01), (1e-3, 0.1)):
        more = 0
        while (m2(temperature, len(start) + len(other) + more + 1) / m2(temperature, len(first)) - 1) <= difference:
            more += 1
        asked = np.concatenate([start, needle.filler(more), other])
        last = tuple(range(len(asked) - len(other), len(asked)))
        cold = ask(needle.engine(sparse=sparse, warm=False), asked, last)
        warm = needle.engine(sparse=sparse, cache_tokens=16384, prefix_temperature_tolerance=1e-3)
        ask(warm, first)
        got = ask(warm, asked, last)
        assert got.computed <= more + len(other) + PART
        assert got.logits is not None and cold.logits is not None
        largest = float(np.abs(got.logits - cold.logits).max())
        with capsys.disabled():
            print(f"\nm^2 {difference:g} apart, {'sparse' if sparse else 'dense'}: logits at most {largest:.2g} apart")
        assert 0 < largest <= logit
        assert got.tokens == cold.tokens and is_answer(needle.text(got.tokens), document.needles[1])


def m2(temperature: Callable[[int], float], length: int) -> float:
    return float(temperature(length)) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(("sparse", "sooner"), [(False, 20), (True, 10)], ids=["dense", "sparse"])
def test_a_second_question_on_sixty_thousand_tokens_comes_many_times_sooner(
    needle: Reader, sparse: bool, sooner: int, capsys: pytest.CaptureFixture[str]
) -> None:
    start, document = needle.document(60_000, 8, 5)
    prompts = [np.concatenate([start, needle.question(one)]) for one in document.needles[:4]]
    engine = needle.engine(sparse=sparse, cache_tokens=65536, prefix_temperature_tolerance=1e-3)
    first, *others, again = (ask(engine, prompt) for prompt in (*prompts, prompts[0]))
    found = [is_answer(needle.text(got.tokens), one) for got, one in zip((first, *others), document.needles)]
    slowest = max(got.seconds for got in others)
    with capsys.disabled():
        print(
            f"\n{first.computed:,} tokens, {'sparse' if sparse else 'dense'}: {first.seconds:.2f} s, the slowest of "
            f"{len(others)} more questions {slowest:.3f} s, {first.seconds / slowest:.0f} times sooner; {found} found"
        )
    assert again.tokens == first.tokens and again.computed < PART + len(prompts[0]) - len(start)
    assert all(found)
    assert first.seconds >= sooner * slowest
