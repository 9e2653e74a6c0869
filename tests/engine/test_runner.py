"""Orders: chunks that stand at points while others run, slots that sequences join and leave, posts of all of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import paddle
import pytest
from runner_setup import Made, fill_with_nan, head, make_runner, rows
from small_model import BUDGETS, CONFIG, random_model

from paddle_qwen1m import config, ops
from paddle_qwen1m import model as model_module
from paddle_qwen1m.cache import PagedCache
from paddle_qwen1m.engine.orders import (
    HEAD_ROWS,
    Advance,
    CopyPage,
    Decode,
    Drop,
    Head,
    Join,
    Order,
    Prefill,
    Rest,
    Rows,
)
from paddle_qwen1m.engine.runner import Runner
from paddle_qwen1m.model import Qwen2OneM
from paddle_qwen1m.parallel import group
from paddle_qwen1m.parallel.mailboxes import Sent

PAGE, PAGES, SLOTS = 32, 64, 6


class Greedy:
    """Takes the largest logit; keeps what it saw."""

    def __init__(self) -> None:
        self.logits: list[np.ndarray] = []

    def sample(self, logits: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        self.logits.append(logits.numpy())
        return paddle.argmax(logits, axis=1), paddle.max(logits, axis=1)


@pytest.fixture
def model(rng: np.random.Generator) -> Qwen2OneM:
    return random_model(rng)


def make(model: Qwen2OneM) -> Made:
    """A runner over a cache that holds nothing but NaN."""
    made = make_runner(
        model, BUDGETS, Greedy(), sparse_threshold=0, num_pages=PAGES, page_size=PAGE, max_num_seqs=SLOTS
    )
    fill_with_nan(made.cache)
    return made


def contents(cache: PagedCache) -> np.ndarray:
    """Keys and values of all layers, [layers, 2, PAGES * PAGE, ...]."""
    return np.stack([np.stack([pages.numpy() for pages in layer[:2]]) for layer in cache.layers]).reshape(
        len(cache.layers), 2, PAGES * PAGE, -1
    )


def result(runner: Runner, order: Order) -> tuple[np.ndarray, ...]:
    post = runner.run(order)
    assert post is not None
    return post.result()


def prefill(runner: Runner, prompt: np.ndarray, pages: range, *, sparse: bool = False) -> int:
    """Reads a whole prompt; the token that follows."""
    last = (len(prompt) - 1,)
    result(runner, Prefill((rows(prompt, pages, sparse=sparse, wanted=last),), points=0))
    return int(head(runner, 0, 1).argmax())


def answer(model: Qwen2OneM, prompt: np.ndarray, tokens: int) -> list[int]:
    """What a prompt gets alone."""
    runner, _ = make(model)
    answer = [prefill(runner, prompt, range(PAGES))]
    joins: tuple[Join, ...] = (Join(0, answer[0], len(prompt), tuple(range(PAGES // 2))),)
    for _ in range(tokens - 1):
        answer.append(int(result(runner, Decode(1, joins))[0][0]))
        joins = ()
    return answer


class Sending(group.Group):
    """One rank whose products of few rows are sent; it notes how many rows each had."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def mailboxes(self, rows: int, width: int) -> Any:
        assert width == CONFIG.hidden_size
        return self if rows <= ops.FEW_ROWS else None

    def product(self, x: paddle.Tensor, weight: paddle.Tensor) -> Sent:
        self.sent.append(len(x))
        return Sent(ops.linear(x, weight))

    def add_rms_norm(
        self, values: paddle.Tensor | Sent, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
    ) -> paddle.Tensor:
        return ops.add_rms_norm(values.values if isinstance(values, Sent) else values, residual, weight, eps)


def advance(runner: Runner, order: Prefill) -> Iterator[None]:
    """Runs a chunk; stops at each of its points."""
    post = runner.run(order)
    while post is not None and not post.done:
        yield
        post = runner.run(Advance())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("row_blocks", [0, 1, 2])
def test_a_chunk_that_is_cut_at_every_point_gives_the_same_bits(
    model: Qwen2OneM, rng: np.random.Generator, sparse: bool, row_blocks: int
) -> None:
    """Decode steps and short prompts between: keys, values and logits are those of a chunk that went on to its end.

    The chunk is [50, 450) of 450 tokens: pieces of 78, 128, 128 and 66 rows.
    """
    prompt, short, running = (rng.integers(0, CONFIG.vocab_size, length) for length in (450, 40, 70))
    wanted = (0, 63, 64, 398, 399)
    chunk = rows(prompt, range(15), begin=50, sparse=sparse, wanted=wanted)
    begun = Prefill((Rows(prompt[:50], 0, (0, 1), 450, sparse),), points=0)
    whole, whole_cache = make(model)
    result(whole, begun)
    result(whole, Prefill((chunk,), row_blocks, points=0))
    expected = head(whole, 0, 5)

    cut, cache = make(model)
    result(cut, begun)
    joins: tuple[Join, ...] = (Join(2, prefill(cut, running, range(20, 26)), 70, tuple(range(20, 26))),)
    answers = []
    for _ in advance(cut, Prefill((chunk,), row_blocks)):
        assert cut.in_flight
        answers.append(int(result(cut, Decode(3, joins))[0][2]))
        joins = ()
        prefill(cut, short, range(30, 32))
    np.testing.assert_array_equal(head(cut, 0, 5), expected)
    assert not cut.in_flight
    np.testing.assert_array_equal(contents(cache)[:, :, : 15 * PAGE], contents(whole_cache)[:, :, : 15 * PAGE])
    assert answers == answer(model, running, len(answers) + 1)[1:]
    groups = {0: 4 if sparse else 1, 1: 2 + 2 + 2 + 2, 2: 4}[row_blocks]
    of_wanted = {0: 2 if sparse else 1, 1: 2 + 1, 2: 2}[row_blocks]  # in the last layer
    assert len(answers) == (CONFIG.num_layers - 1) * (groups + 1) + of_wanted + 1


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("wanted, groups", [((), 0), ((399,), 1), ((0, 70, 399), 3)], ids=["none", "last", "three"])
def test_the_last_layer_ends_early(
    model: Qwen2OneM,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    sparse: bool,
    wanted: tuple[int, ...],
    groups: int,
) -> None:
    """Of 400 rows it attends in the row blocks whose logits are wanted, and computes few rows beyond attention; all
    keys are cached, and the logits are those of a chunk that wants every row's.
    """
    prompt = rng.integers(0, CONFIG.vocab_size, 400)
    whole, whole_cache = make(model)
    result(whole, Prefill((rows(prompt, range(15), sparse=sparse, wanted=tuple(range(400))),), points=0))
    expected = np.concatenate([head(whole, row, 1) for row in wanted]) if wanted else None

    computed, attended = list[int](), list[int]()
    gated_linear, attend = ops.gated_linear, (ops.dca_prefill, ops.dca_sparse_prefill)

    def note_mlp(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        computed.append(len(x))
        return gated_linear(x, weight)

    def note_attend(which: int, *arguments: Any, **options: Any) -> None:
        attended.append(len(computed))
        attend[which](*arguments, **options)

    monkeypatch.setattr(ops, "gated_linear", note_mlp)
    monkeypatch.setattr(ops, "dca_prefill", partial(note_attend, 0))
    monkeypatch.setattr(ops, "dca_sparse_prefill", partial(note_attend, 1))
    runner, cache = make(model)
    result(runner, Prefill((rows(prompt, range(15), sparse=sparse, wanted=wanted),), 1, points=0))
    before = CONFIG.num_layers - 1
    assert computed == [400] * before + [ops.FEW_ROWS + 1] * (len(wanted) > 0)
    assert attended.count(before) == groups
    np.testing.assert_array_equal(contents(cache), contents(whole_cache))
    if expected is not None:
        np.testing.assert_allclose(head(runner, 0, len(wanted)), expected, atol=1e-4)


def test_prompts_of_one_order_are_read_as_each_alone(model: Qwen2OneM, rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, CONFIG.vocab_size, length) for length in (40, 3, 130, 64)]
    runner, cache = make(model)
    together = tuple(
        rows(prompt, range(8 * number, 8 * number + 8), sparse=len(prompt) == 130, wanted=(len(prompt) - 1,))
        for number, prompt in enumerate(prompts)
    )
    order = Prefill(together, 1)
    assert order.num_wanted == 4 and len(list(advance(runner, order))) > 4
    tokens = head(runner, 0, 4).argmax(axis=1).tolist()
    alone, alone_cache = make(model)
    assert tokens == [
        prefill(alone, prompt, range(8 * number, 8 * number + 8), sparse=len(prompt) == 130)
        for number, prompt in enumerate(prompts)
    ]
    np.testing.assert_allclose(contents(cache), contents(alone_cache), rtol=1e-4, atol=1e-4)


def test_logits_of_many_rows_come_in_slices(model: Qwen2OneM, rng: np.random.Generator) -> None:
    """They are kept until another chunk has ended, whatever stands at a point or decodes meanwhile."""
    prompt = rng.integers(0, CONFIG.vocab_size, 300)
    runner, _ = make(model)
    result(runner, Prefill((rows(prompt, range(10), wanted=tuple(range(300))),), points=0))
    runner.run(Prefill((rows(prompt, range(20, 30)),)))
    result(runner, Decode(2, (Join(1, 5, 300, tuple(range(10))),)))
    sliced = np.concatenate([head(runner, 0, HEAD_ROWS), head(runner, HEAD_ROWS, 300 - HEAD_ROWS)])
    one_by_one = np.concatenate([head(runner, row, 1) for row in (0, 150, 299)])
    np.testing.assert_allclose(sliced[[0, 150, 299]], one_by_one, rtol=1e-5, atol=1e-5)
    for length in (1, 151):
        expected = prefill(make(model).runner, prompt[:length], range(10))
        assert length > 160 or sliced[length - 1].argmax() == expected
    runner.run(Advance(0))
    with pytest.raises(AssertionError, match="no chunk wanted"):
        runner.run(Head(0, 1))


@pytest.mark.parametrize("points", [1, 3])
def test_a_dropped_chunk_leaves_its_pages_to_others(model: Qwen2OneM, rng: np.random.Generator, points: int) -> None:
    first, second = (rng.integers(0, CONFIG.vocab_size, length) for length in (300, 280))
    runner, _ = make(model)
    runner.run(Prefill((rows(first, range(10), sparse=True),), 1, points))
    assert runner.in_flight
    runner.run(Drop())
    assert not runner.in_flight
    assert prefill(runner, second, range(10), sparse=True) == prefill(
        make(model).runner, second, range(10), sparse=True
    )


def test_a_chunk_that_fails_is_gone(
    model: Qwen2OneM, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = rng.integers(0, CONFIG.vocab_size, 100)
    runner, _ = make(model)
    runner.run(Prefill((rows(prompt, range(10)),)))
    with monkeypatch.context() as patched:
        patched.setattr(ops, "gated_linear", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            runner.run(Advance())
    assert not runner.in_flight
    assert prefill(runner, prompt, range(10)) == prefill(make(model).runner, prompt, range(10))


def test_sequences_that_join_and_leave_get_what_they_get_alone(model: Qwen2OneM, rng: np.random.Generator) -> None:
    """Prompts across borders of pages and DCA chunks, in whatever slot, moved between slots, among empty ones."""
    lengths, wanted = [5, 31, 120, 127, 250, 60, 33], [12, 9, 20, 5, 14, 7, 16]
    prompts = [rng.integers(0, CONFIG.vocab_size, length) for length in lengths]
    expected = [answer(model, prompt, count) for prompt, count in zip(prompts, wanted)]
    runner, _ = make(model)
    answers = [[prefill(runner, prompt, range(9 * n, 9 * n + 9))] for n, prompt in enumerate(prompts)]
    slots: list[int | None] = [None] * SLOTS

    def join(number: int, slot: int) -> Join:
        slots[slot] = number
        length = lengths[number] + len(answers[number]) - 1
        return Join(slot, answers[number][-1], length, tuple(range(9 * number, 9 * number + 9)))

    while any(len(tokens) < count for tokens, count in zip(answers, wanted)):
        leave, joins = [], []
        for slot, number in enumerate(slots):
            if number is not None and (len(answers[number]) == wanted[number] or rng.random() < 0.2):
                slots[slot] = None
                leave.append(slot)
        for number in range(len(prompts)):
            free = [slot for slot, taken in enumerate(slots) if taken is None]
            if number not in slots and len(answers[number]) < wanted[number] and free and rng.random() < 0.6:
                joins.append(join(number, int(rng.choice(free))))
        used = max((slot + 1 for slot, number in enumerate(slots) if number is not None), default=0)
        if not used:
            continue
        ids, logprobs = result(runner, Decode(used, tuple(joins), tuple(leave)))
        assert used <= len(ids) == len(logprobs) <= SLOTS
        for slot, number in enumerate(slots):
            if number is not None:
                answers[number].append(int(ids[slot]))
    assert answers == expected


def test_products_that_are_summed_send_few_rows_where_there_are_mailboxes(
    model: Qwen2OneM, rng: np.random.Generator
) -> None:
    """Both of a layer, step after step; many rows go another way, and the answer is the same."""
    prompt = rng.integers(0, CONFIG.vocab_size, 40)
    expected = answer(model, prompt, 6)
    model.group = sending = Sending()
    assert answer(model, prompt, 6) == expected
    assert sending.sent == [1] * (5 * 2 * CONFIG.num_layers)


def test_a_step_writes_one_token_of_each_sequence_and_nothing_else(model: Qwen2OneM, rng: np.random.Generator) -> None:
    """Slots that were left, never filled, or lie behind those that are run, change no page."""
    runner, cache = make(model)
    prompt = rng.integers(0, CONFIG.vocab_size, 50)
    token = prefill(runner, prompt, range(7, 9))
    pages = (7, 8)
    result(runner, Decode(5, (Join(1, token, 50, pages), Join(4, token, 50, (7, 9)))))
    before = contents(cache)
    result(runner, Decode(3, leave=(4,)))
    changed = np.argwhere((contents(cache) != before) & ~(np.isnan(contents(cache)) & np.isnan(before)))
    assert set(changed[:, 2].tolist()) == {8 * PAGE + 51 - PAGE}
    before = contents(cache)
    result(runner, Decode(4, leave=(1,)))
    np.testing.assert_array_equal(contents(cache), before)


def test_a_sequence_that_outgrows_its_pages_is_an_error(model: Qwen2OneM) -> None:
    runner, _ = make(model)
    order = Decode(1, (Join(0, 3, 2 * PAGE, (0, 1)),))
    with pytest.raises(ValueError, match="slot"):
        runner.run(order)


def test_rest_empties_everything_and_work_goes_on(model: Qwen2OneM, rng: np.random.Generator) -> None:
    prompt = rng.integers(0, CONFIG.vocab_size, 100)
    runner, cache = make(model)
    token = prefill(runner, prompt, range(4))
    runner.run(Decode(2, (Join(0, token, 100, (0, 1, 2, 3)),)))
    runner.run(Prefill((rows(prompt, range(10, 14)),)))
    runner.run(Rest())
    before = contents(cache)
    assert not runner.in_flight
    runner.run(Decode(2))
    np.testing.assert_array_equal(contents(cache), before)
    assert prefill(runner, prompt, range(4)) == token


def test_pages_are_copied_in_every_layer(model: Qwen2OneM, rng: np.random.Generator) -> None:
    runner, cache = make(model)
    prefill(runner, rng.integers(0, CONFIG.vocab_size, 64), range(2))
    expected = contents(cache)
    expected[:, :, 5 * PAGE : 5 * PAGE + 20] = expected[:, :, PAGE : PAGE + 20]
    assert runner.run(CopyPage(1, 5, 20)) is None
    np.testing.assert_array_equal(contents(cache), expected)


@pytest.mark.parametrize("row_blocks", [0, 1, 3])
def test_a_large_chunk_goes_through_in_parts(
    model: Qwen2OneM, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, row_blocks: int
) -> None:
    """Queries, index tables and MLP of 64 rows at a time in place of all: keys, values and logits are the same. Short
    prompts stand before and behind a sparse one, whose pieces have 128 rows, and nothing begins where a part does.
    """
    prompts = [rng.integers(0, CONFIG.vocab_size, length) for length in (40, 450, 130, 3)]
    chunk = tuple(
        rows(prompt, range(16 * number, 16 * number + 16), sparse=len(prompt) == 450, wanted=(0, len(prompt) - 1))
        for number, prompt in enumerate(prompts)
    )

    def read(at_once: int | None) -> tuple[np.ndarray, np.ndarray]:
        if at_once is not None:
            monkeypatch.setattr(config, "ROWS_AT_ONCE", at_once)
            monkeypatch.setattr(model_module, "LANE_ROWS", at_once)
        runner, cache = make(model)
        for _ in advance(runner, Prefill(chunk, row_blocks)):
            pass
        return head(runner, 0, 8), contents(cache)

    (logits, kept), (of_parts, kept_of_parts) = read(None), read(64)
    np.testing.assert_allclose(of_parts, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(kept_of_parts, kept, rtol=0, atol=1e-5 * np.nanmax(np.abs(kept)))
