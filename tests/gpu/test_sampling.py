"""Sampling on a GPU beside the oracle: the same token for the same (seed, step), up to float32 at a border of two."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

VOCABULARY = 152_064
BORDER = 3e-6  # what float32 weights may move a cumulative probability by
POISON = -7
DEFAULTS = {"masked": (0, np.uint8), "biased": (0, np.uint8), **oracle.SETTINGS}


class Batch(NamedTuple):
    """Inputs of a call, every setting one a row; counts and steps are those before the call."""

    logits: np.ndarray
    counts: np.ndarray
    mask: np.ndarray
    bias: np.ndarray
    settings: dict[str, np.ndarray]


class Drawn(NamedTuple):
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    steps: np.ndarray


def batch_of(logits: np.ndarray, **settings: Any) -> Batch:
    """A batch of rows of logits; every setting is one number or one a row. allowed, bias: [rows, vocab], read where
    `masked` and `biased` say so, and else poisoned.
    """
    rows, vocabulary = logits.shape
    counts = np.array(np.broadcast_to(settings.pop("counts", 0), logits.shape), dtype=np.uint16)
    allowed = settings.pop("allowed", np.zeros((rows, vocabulary)))
    bias = settings.pop("bias", np.full((rows, vocabulary), np.nan))
    assert settings.keys() <= DEFAULTS.keys()
    values = {
        name: np.array(np.broadcast_to(settings.get(name, default), rows), dtype)
        for name, (default, dtype) in DEFAULTS.items()
    }
    return Batch(
        np.asarray(logits, np.float32), counts, oracle.mask_words(allowed), np.asarray(bias, np.float32), values
    )


def on_gpu(values: np.ndarray) -> Any:
    """A tensor of the same bits; PyTorch lacks some unsigned types."""
    signed = {"uint16": np.int16, "uint32": np.int32}.get(values.dtype.name, values.dtype)
    return torch.from_numpy(np.ascontiguousarray(values).view(signed)).cuda()


def draw(cuda: Any, batch: Batch) -> Drawn:
    rows, vocabulary = batch.logits.shape
    tensors = {name: on_gpu(values) for name, values in batch.settings.items()}
    counts = on_gpu(batch.counts)
    ids = torch.full((rows,), POISON, dtype=torch.int64, device="cuda")
    logprobs = torch.full((rows,), float("nan"), dtype=torch.float32, device="cuda")
    cuda(
        "sample",
        logits=on_gpu(batch.logits),
        counts=counts,
        mask=on_gpu(batch.mask),
        bias=on_gpu(batch.bias),
        ids=ids,
        logprobs=logprobs,
        batch=rows,
        vocab=vocabulary,
        **tensors,
    )
    drawn = [t.cpu().numpy() for t in (ids, logprobs, counts, tensors["steps"])]
    return Drawn(drawn[0], drawn[1], drawn[2].view(np.uint16), drawn[3])


def processed_row(batch: Batch, row: int) -> np.ndarray:
    """Rounded to float32, since penalties may make logits equal there.

    Once, while an op rounds at every step: cases are made so that one step at most is not exact.
    """
    own = {name: values[row].item() for name, values in batch.settings.items()}
    processed = oracle.processed_logits(
        batch.logits[row],
        batch.counts[row],
        own["repetition_penalty"],
        own["frequency_penalty"],
        own["presence_penalty"],
        batch.mask[row] if own["masked"] else None,
        batch.bias[row] if own["biased"] else None,
    )
    return processed.astype(np.float32).astype(np.float64)


def assert_like_the_oracle(batch: Batch, drawn: Drawn) -> None:
    """Tokens, log-probabilities, counts and steps of every row."""
    for row, logits in enumerate(batch.logits):
        own = {name: values[row].item() for name, values in batch.settings.items()}
        token, where = int(drawn.ids[row]), f"row {row}: token {drawn.ids[row]}, {own}"
        if own["steps"] < 0:
            assert token == 0 and drawn.logprobs[row] == 0.0, where
            np.testing.assert_array_equal(drawn.counts[row], batch.counts[row], where)
            assert drawn.steps[row] == own["steps"], where
            continue
        assert 0 <= token < len(logits), where
        processed = processed_row(batch, row)
        if own["temperature"] > 0:
            assert may_draw(processed, token, own), where
        else:
            assert token == processed.argmax(), where
        logprob = oracle.log_softmax(processed)[token]
        np.testing.assert_allclose(drawn.logprobs[row], logprob, rtol=1e-6, atol=2e-5, err_msg=where)
        counts = batch.counts[row].copy()
        if counts[token] & oracle.LARGEST_COUNT < oracle.LARGEST_COUNT:
            counts[token] += 1
        np.testing.assert_array_equal(drawn.counts[row], counts, where)
        assert drawn.steps[row] == own["steps"] + 1, where


def may_draw(processed: np.ndarray, token: int, own: dict[str, Any]) -> bool:
    """Whether the uniform of (seed, step) lies in the token's share of the probability, its borders moved by rounding.

    So may be those of top_p and min_p.
    """
    uniform = oracle.uniform(own["seeds"], own["steps"])
    moves = 1.0, 1 - BORDER, 1 + BORDER
    for top_p, min_p in itertools.product(moves if own["top_p"] < 1 else (1.0,), moves if own["min_p"] > 0 else (1.0,)):
        limits = own["top_k"], own["top_p"] * top_p, own["min_p"] * min_p
        ids, cumulative = oracle.candidates(processed, own["temperature"], *limits)
        for place in np.flatnonzero(ids == token):
            begin = cumulative[place - 1] if place > 0 else 0.0
            if begin - BORDER <= uniform <= cumulative[place] + BORDER:
                return True
    return False


def model_logits(rng: np.random.Generator, rows: int, vocabulary: int) -> np.ndarray:
    """A bulk and, above it, a few tokens that a model believes in."""
    logits = 2.5 * rng.standard_normal((rows, vocabulary))
    for row in logits:
        row[rng.integers(0, vocabulary, 40)] += rng.uniform(5, 20)
    return logits


def on_grid(numbers: np.ndarray) -> np.ndarray:
    """Rounded so that float32 holds their sums exactly."""
    return np.round(numbers * 1024) / 1024


def random_counts(rng: np.random.Generator, rows: int, vocabulary: int) -> np.ndarray:
    """Of every kind: in the prompt, in the answer up to the largest count, in both, in none."""
    prompt = np.where(rng.random((rows, vocabulary)) < 0.2, oracle.IN_PROMPT, 0)
    return prompt | np.where(rng.random((rows, vocabulary)) < 0.2, rng.choice([1, 2, 40], (rows, vocabulary)), 0)


@pytest.mark.parametrize("vocabulary", [1, 2, 777, 1024, 4099, VOCABULARY])
def test_greedy_takes_the_first_of_the_largest(cuda: Any, rng: np.random.Generator, vocabulary: int) -> None:
    """Temperature 0 is the arg-max with ties to the lower id, whatever top_k, top_p and min_p say."""
    batch = batch_of(rng.integers(-3, 4, (33, vocabulary)) / 2.0, temperature=0.0, top_k=5, top_p=0.1, min_p=0.5)
    drawn = draw(cuda, batch)
    np.testing.assert_array_equal(drawn.ids, batch.logits.argmax(axis=1))
    assert_like_the_oracle(batch, drawn)


def test_zeros_of_both_signs_tie(cuda: Any) -> None:
    batch = batch_of(np.array([[-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, 0.0]]), temperature=0.0)
    assert draw(cuda, batch).ids.tolist() == [1, 1]
    batch = batch_of(np.tile([-1.0, -0.0, 0.0, -0.0], (300, 1)), top_k=2, seeds=np.arange(300))
    assert set(draw(cuda, batch).ids.tolist()) == {1, 2}


@pytest.mark.parametrize("vocabulary", [1500, 1501, 1502, 1503])
def test_every_row_has_settings_of_its_own(cuda: Any, rng: np.random.Generator, vocabulary: int) -> None:
    """Also in rows that do not begin at 16 bytes."""
    rows = 400
    shape = rows, vocabulary
    repetition = rng.choice([1.0, 1.0, 1.05, 1.3, 0.8], rows)
    batch = batch_of(
        on_grid(rng.choice([0.5, 4.0], (rows, 1)) * rng.standard_normal(shape)),
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.0], rows),
        top_k=rng.choice([0, 1, 2, 20, 511, 512, 513, 1400, 5000], rows),
        top_p=rng.choice([0.0, 0.1, 0.5, 0.8, 0.95, 1.0], rows),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0], rows),
        repetition_penalty=repetition,
        frequency_penalty=np.where(repetition == 1.0, rng.choice([0.0, 0.25, -0.125], rows), 0.0),
        presence_penalty=np.where(repetition == 1.0, rng.choice([0.0, 0.75, -0.25], rows), 0.0),
        counts=random_counts(rng, *shape),
        allowed=rng.random(shape) < 0.5,
        masked=rng.random(rows) < 0.5,
        bias=np.where(rng.random(shape) < 0.01, on_grid(5.0 * rng.standard_normal(shape)), 0.0),
        biased=rng.random(rows) < 0.5,
        seeds=rng.integers(-(2**62), 2**62, rows),
        steps=rng.integers(-1000, 10000, rows),
    )
    assert_like_the_oracle(batch, draw(cuda, batch))


SETTINGS = [(0.7, 20, 0.8), (1.0, 0, 1.0), (1.0, 0, 0.95), (0.3, 1000, 0.9), (2.0, VOCABULARY, 1.0), (1.0, 1, 1.0)]
SETTINGS += [(1.0, 513, 0.5), (5.0, 0, 0.9), (50.0, 100_000, 0.99), (1e-3, 50, 1.0), (1e-30, 0, 1.0), (0.7, 512, 1e-9)]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_a_full_vocabulary(cuda: Any, rng: np.random.Generator, temperature: float, top_k: int, top_p: float) -> None:
    """The shape of the real model, as a model's logits are and flat."""
    for logits in (model_logits(rng, 6, VOCABULARY), 0.01 * rng.standard_normal((6, VOCABULARY))):
        batch = batch_of(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=1.05,
            counts=random_counts(rng, 6, VOCABULARY),
            allowed=rng.random((6, VOCABULARY)) < 0.9,
            masked=np.arange(6) % 2,
            seeds=rng.integers(0, 2**62, 6),
        )
        assert_like_the_oracle(batch, draw(cuda, batch))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (20, 1.0), (1000, 1.0), (0, 0.25), (1000, 0.25), (3000, 0.9)])
def test_equal_logits_are_ordered_by_id(cuda: Any, rng: np.random.Generator, top_k: int, top_p: float) -> None:
    """Nothing but ties: of a whole vocabulary, of its upper half, and of a small one."""
    constant = np.full((4, VOCABULARY), 1.5)
    upper = np.where(np.arange(VOCABULARY) < VOCABULARY // 2, -1.0, 1.5)[None].repeat(4, 0)
    few = np.zeros((300, 10))
    for logits in (constant, upper, few):
        batch = batch_of(logits, top_k=top_k, top_p=top_p, seeds=rng.integers(0, 2**62, len(logits)))
        assert_like_the_oracle(batch, draw(cuda, batch))


def test_a_draw_walks_down_the_probabilities(cuda: Any) -> None:
    """The token is the first, most probable first and ties by id, whose cumulative probability exceeds the uniform."""
    probabilities, order = np.array([0.125, 0.5, 0.125, 0.25]), [1, 3, 0, 2]
    cumulative = np.cumsum(probabilities[order])
    steps = np.arange(5000)
    drawn = draw(cuda, batch_of(np.tile(np.log(probabilities), (5000, 1)), seeds=7, steps=steps))
    expected = [order[int(np.argmax(cumulative > oracle.uniform(7, int(step))))] for step in steps]
    assert drawn.ids.tolist() == expected
    np.testing.assert_allclose(np.bincount(drawn.ids) / 5000, probabilities, atol=0.03)


def test_steps_and_counts_carry_from_call_to_call(cuda: Any, rng: np.random.Generator) -> None:
    """A sequence of calls on the same counts and steps, as decode makes them."""
    batch = batch_of(
        on_grid(4.0 * rng.standard_normal((16, 1000))),
        temperature=rng.choice([0.0, 1.0], 16),
        top_k=rng.choice([0, 20], 16),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        seeds=rng.integers(0, 2**62, 16),
    )
    for _ in range(12):
        drawn = draw(cuda, batch)
        assert_like_the_oracle(batch, drawn)
        batch = batch._replace(counts=drawn.counts, settings={**batch.settings, "steps": drawn.steps})
    assert (batch.settings["steps"] == 12).all() and (batch.counts.sum(axis=1) == 12).all()


def test_counts_end_at_the_largest_and_keep_the_prompts_bit(cuda: Any) -> None:
    prompt, most = oracle.IN_PROMPT, oracle.LARGEST_COUNT
    before = np.array([[0, 0], [prompt, 0], [most - 1, 0], [most, 0], [prompt | most, 0]])
    drawn = draw(cuda, batch_of(np.tile([1.0, 0.0], (5, 1)), counts=before, temperature=0.0))
    assert drawn.counts[:, 0].tolist() == [1, prompt | 1, most, most, prompt | most]


@pytest.mark.parametrize("vocabulary", [1, 5, 33, 1021, 4096, 4098])
def test_a_mask_decides_before_everything(cuda: Any, rng: np.random.Generator, vocabulary: int) -> None:
    """Every bit counts, also in rows that begin anywhere; a bias does not bring back what the mask forbids."""
    logits = rng.standard_normal((65, vocabulary))
    allowed = np.zeros(logits.shape, bool)
    allowed[np.arange(65), rng.integers(0, vocabulary, 65)] = True
    bias = np.where(allowed, -50.0, 50.0)
    for temperature in (0.0, 1.0):
        batch = batch_of(logits, allowed=allowed, masked=1, bias=bias, biased=1, temperature=temperature)
        drawn = draw(cuda, batch)
        np.testing.assert_array_equal(drawn.ids, allowed.argmax(axis=1))
        np.testing.assert_allclose(drawn.logprobs, 0.0, atol=1e-6)
    assert not draw(cuda, batch_of(logits, masked=1, temperature=1.0)).ids.any()  # nothing is allowed


def test_bias_comes_first_then_repetition_then_the_other_penalties(cuda: Any) -> None:
    logits, bias = np.array([[-1.0, 0.0, 5.0]]), np.array([[3.0, 0.0, -8.0]])
    settings = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.125}
    batch = batch_of(logits, counts=np.array([[1, 0, 1]]), bias=bias, biased=1, temperature=0.0, **settings)
    drawn = draw(cuda, batch)
    processed = np.array([(-1.0 + 3.0) / 2.0 - 0.375, 0.0, (5.0 - 8.0) * 2.0 - 0.375])
    assert drawn.ids.tolist() == [0]
    np.testing.assert_allclose(drawn.logprobs, oracle.log_softmax(processed)[:1], atol=2e-6)


@pytest.mark.parametrize("top_k, min_p", [(0, 0.001), (0, 0.2), (20, 0.05), (1000, 0.001), (0, 1.0)])
def test_min_p_over_a_full_vocabulary(cuda: Any, rng: np.random.Generator, top_k: int, min_p: float) -> None:
    for top_p in (1.0, 0.7):
        batch = batch_of(
            model_logits(rng, 8, VOCABULARY),
            temperature=rng.choice([0.7, 1.5], 8),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=rng.integers(0, 2**62, 8),
        )
        assert_like_the_oracle(batch, draw(cuda, batch))


def test_one_candidate_left(cuda: Any) -> None:
    """All logits but one are -inf: that one, at log-probability 0."""
    logits = np.full((3, VOCABULARY), -np.inf)
    logits[0, VOCABULARY - 1], logits[1, 0], logits[2, 77_777] = -4.0, 3.0, 0.0
    for top_k, top_p in ((20, 0.8), (0, 1.0), (5000, 0.5)):
        drawn = draw(cuda, batch_of(logits, temperature=np.array([0.0, 0.7, 1.0]), top_k=top_k, top_p=top_p))
        assert drawn.ids.tolist() == [VOCABULARY - 1, 0, 77_777] and drawn.logprobs.tolist() == [0.0, 0.0, 0.0]


def test_logits_that_are_no_numbers_end_in_some_token(cuda: Any, rng: np.random.Generator) -> None:
    """NaN is never drawn beside a number; rows of nothing but NaN or infinities give an id and return."""
    logits = rng.standard_normal((64, 5000))
    holes = rng.random((64, 5000)) < 0.9
    logits[holes] = np.nan
    settings = {"temperature": rng.choice([0.0, 1.0], 64), "top_k": rng.choice([0, 20, 1000], 64), "top_p": 0.9}
    drawn = draw(cuda, batch_of(logits, **settings, seeds=np.arange(64)))
    assert not holes[np.arange(64), drawn.ids].any() and np.isfinite(drawn.logprobs).all()
    for value in (np.nan, -np.inf, np.inf):
        drawn = draw(cuda, batch_of(np.full((64, 5000), value), **settings))
        assert (drawn.ids == 0).all()


def test_a_row_is_drawn_alike_alone_and_every_time(cuda: Any, rng: np.random.Generator) -> None:
    """Sums do not depend on the order in which threads add to them, nor rows on one another."""
    rows = 8
    logits = 0.001 * rng.standard_normal((rows, VOCABULARY))
    seeds, top_k = rng.integers(0, 2**62, rows), np.array([0, 0, 20, 20, 1000, 1000, 100_000, 100_000])
    first = draw(cuda, batch_of(logits, seeds=seeds, top_k=top_k, top_p=0.97))
    again = draw(cuda, batch_of(logits[::-1].copy(), seeds=seeds[::-1], top_k=top_k[::-1], top_p=0.97))
    assert again.ids[::-1].tolist() == first.ids.tolist()
    for row in range(rows):
        alone = draw(cuda, batch_of(logits[row : row + 1], seeds=seeds[row], top_k=top_k[row], top_p=0.97))
        assert alone.ids.tolist() == [first.ids[row]] and alone.logprobs.tolist() == [first.logprobs[row]]


def top_logprobs(cuda: Any, logits: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    rows, vocabulary = logits.shape
    top_ids = torch.full((rows, k), POISON, dtype=torch.int32, device="cuda")
    top = torch.full((rows, k), float("nan"), dtype=torch.float32, device="cuda")
    logprobs = torch.full((rows,), float("nan"), dtype=torch.float32, device="cuda")
    ranks = torch.full((rows,), POISON, dtype=torch.int32, device="cuda")
    outputs = {"top_ids": top_ids, "top_logprobs": top, "logprobs": logprobs, "ranks": ranks}
    given = on_gpu(np.asarray(logits, np.float32))
    before = given.clone()
    cuda("top_logprobs", logits=given, ids=on_gpu(ids), **outputs, batch=rows, vocab=vocabulary, k=k)
    assert torch.equal(given.view(torch.int32), before.view(torch.int32))
    return tuple(tensor.cpu().numpy() for tensor in outputs.values())


@pytest.mark.parametrize("vocabulary, k", [(1, 1), (20, 20), (777, 5), (4099, 512), (VOCABULARY, 1), (VOCABULARY, 20)])
def test_log_probabilities_of_the_likeliest_and_of_a_given_token(
    cuda: Any, rng: np.random.Generator, vocabulary: int, k: int
) -> None:
    """As a model's logits are, nothing but ties, and with NaN and infinities among them; tokens far down count."""
    rows = 40
    ties = np.round(model_logits(rng, rows, vocabulary))
    holes = np.where(rng.random(ties.shape) < 0.5, np.nan, ties)
    far = np.where(np.arange(vocabulary) == vocabulary // 2, 80.0, ties)
    empty = np.full((rows, vocabulary), -np.inf)
    for logits in (model_logits(rng, rows, vocabulary), ties, np.zeros(ties.shape), holes, far, empty):
        logits, ids = logits.astype(np.float32), rng.integers(0, vocabulary, rows)
        top_ids, top, logprobs, ranks = oracle.top_logprobs(logits, ids, k)
        actual = top_logprobs(cuda, logits, ids, k)
        np.testing.assert_array_equal(actual[0], top_ids)
        np.testing.assert_allclose(actual[1], top, rtol=1e-6, atol=2e-5)
        np.testing.assert_allclose(actual[2], logprobs, rtol=1e-6, atol=2e-5)
        np.testing.assert_array_equal(actual[3], ranks)
