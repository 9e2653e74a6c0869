"""Sampling on a GPU beside the oracle: the same token for the same (seed, step), up to float32 at a border of two."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

VOCABULARY = 152_064
BORDER = 3e-6  # what float32 weights may move a cumulative probability by
POISON = -7
DEFAULTS = {
    "temperature": (1.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "repetition_penalty": (1.0, np.float32),
    "banned_steps": (2**62, np.int64),
    "seeds": (0, np.int64),
    "steps": (0, np.int64),
}


class Batch(NamedTuple):
    """Inputs of a call, every setting one a row; seen and steps are those before the call."""

    logits: np.ndarray
    seen: np.ndarray
    banned: np.ndarray
    settings: dict[str, np.ndarray]


class Drawn(NamedTuple):
    ids: np.ndarray
    logprobs: np.ndarray
    seen: np.ndarray
    steps: np.ndarray


def batch_of(logits: np.ndarray, **settings: Any) -> Batch:
    """A batch of rows of logits; every setting is one number or one a row."""
    rows, vocabulary = logits.shape
    seen = np.array(settings.pop("seen", np.zeros((rows, vocabulary))), dtype=np.uint8)
    banned = np.array(settings.pop("banned", np.full((rows, 1), -1)), dtype=np.int32)
    assert settings.keys() <= DEFAULTS.keys()
    values = {
        name: np.array(np.broadcast_to(settings.get(name, default), rows), dtype)
        for name, (default, dtype) in DEFAULTS.items()
    }
    return Batch(np.asarray(logits, np.float32), seen, banned, values)


def draw(cuda: Any, batch: Batch) -> Drawn:
    rows, vocabulary = batch.logits.shape
    tensors = {name: torch.from_numpy(values).cuda() for name, values in batch.settings.items()}
    seen = torch.from_numpy(batch.seen).cuda()
    ids = torch.full((rows,), POISON, dtype=torch.int64, device="cuda")
    logprobs = torch.full((rows,), float("nan"), dtype=torch.float32, device="cuda")
    cuda(
        "sample",
        logits=torch.from_numpy(batch.logits).cuda(),
        seen=seen,
        banned=torch.from_numpy(batch.banned).cuda(),
        ids=ids,
        logprobs=logprobs,
        batch=rows,
        vocab=vocabulary,
        banned_width=batch.banned.shape[1],
        **tensors,
    )
    return Drawn(*(t.cpu().numpy() for t in (ids, logprobs, seen, tensors["steps"])))


def assert_like_the_oracle(batch: Batch, drawn: Drawn) -> None:
    """Tokens, log-probabilities, marks and steps of every row."""
    for row, logits in enumerate(batch.logits):
        own = {name: values[row].item() for name, values in batch.settings.items()}
        token, where = int(drawn.ids[row]), f"row {row}: token {drawn.ids[row]}, {own}"
        assert 0 <= token < len(logits), where
        bans = batch.banned[row] if own["steps"] < own["banned_steps"] else batch.banned[row, :0]
        # Rounded to float32, since penalties may make logits equal there.
        processed = oracle.processed_logits(logits, batch.seen[row], own["repetition_penalty"], bans).astype(np.float32)
        processed = processed.astype(np.float64)
        if own["temperature"] > 0:
            assert may_draw(processed, token, own), where
        else:
            assert token == processed.argmax(), where
        peak = processed.max()
        logprob = processed[token] - peak - np.log(np.exp(processed - peak).sum())
        np.testing.assert_allclose(drawn.logprobs[row], logprob, rtol=1e-6, atol=2e-5, err_msg=where)
        marks = batch.seen[row].copy()
        marks[token] = 1
        np.testing.assert_array_equal(drawn.seen[row], marks, where)
        assert drawn.steps[row] == own["steps"] + 1, where


def may_draw(processed: np.ndarray, token: int, own: dict[str, Any]) -> bool:
    """Whether the uniform of (seed, step) lies in the token's share of the probability, its borders moved by rounding.

    So may be the border of top_p.
    """
    uniform = oracle.uniform(own["seeds"], own["steps"])
    for top_p in (own["top_p"], own["top_p"] * (1 - BORDER), own["top_p"] * (1 + BORDER)):
        ids, cumulative = oracle.candidates(processed, own["temperature"], own["top_k"], top_p)
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


@pytest.mark.parametrize("vocabulary", [1, 2, 777, 1024, 4099, VOCABULARY])
def test_greedy_takes_the_first_of_the_largest(cuda: Any, rng: np.random.Generator, vocabulary: int) -> None:
    """Temperature 0 is the arg-max with ties to the lower id, whatever top_k and top_p say."""
    batch = batch_of(rng.integers(-3, 4, (33, vocabulary)) / 2.0, temperature=0.0, top_k=5, top_p=0.1)
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
    batch = batch_of(
        rng.choice([0.5, 4.0], (rows, 1)) * rng.standard_normal((rows, vocabulary)),
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.0], rows),
        top_k=rng.choice([0, 1, 2, 20, 511, 512, 513, 1400, 5000], rows),
        top_p=rng.choice([0.0, 0.1, 0.5, 0.8, 0.95, 1.0], rows),
        repetition_penalty=rng.choice([1.0, 1.05, 1.3, 0.8], rows),
        seen=rng.random((rows, vocabulary)) < 0.3,
        banned=np.where(rng.random((rows, 4)) < 0.5, rng.integers(0, vocabulary, (rows, 4)), -1),
        banned_steps=rng.choice([0, 5000, 2**62], rows),
        seeds=rng.integers(-(2**62), 2**62, rows),
        steps=rng.integers(0, 10000, rows),
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
            seen=rng.random((6, VOCABULARY)) < 0.1,
            banned=rng.integers(0, VOCABULARY, (6, 2)),
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


def test_steps_and_marks_carry_from_call_to_call(cuda: Any, rng: np.random.Generator) -> None:
    """A sequence of calls on the same seen and steps, as decode makes them; bans end on the way."""
    batch = batch_of(
        4.0 * rng.standard_normal((16, 1000)),
        temperature=rng.choice([0.0, 1.0], 16),
        top_k=rng.choice([0, 20], 16),
        repetition_penalty=1.3,
        banned=rng.integers(0, 1000, (16, 2)),
        banned_steps=rng.integers(0, 12, 16),
        seeds=rng.integers(0, 2**62, 16),
    )
    for _ in range(12):
        drawn = draw(cuda, batch)
        assert_like_the_oracle(batch, drawn)
        batch = batch._replace(seen=drawn.seen, settings={**batch.settings, "steps": drawn.steps})
    assert (batch.settings["steps"] == 12).all()


def test_bans_hold_while_the_step_is_below_theirs(cuda: Any) -> None:
    """Banned ids at both ends of a row, -1 for none; from banned_steps on they are free."""
    logits = np.array([[9.0, 1.0, 2.0, 1.0, 8.0, 9.5]])
    for steps, expected in ((0, 4), (2, 4), (3, 5)):
        batch = batch_of(logits, temperature=0.0, banned=[[5, -1, 0]], banned_steps=3, steps=steps)
        drawn = draw(cuda, batch)
        assert drawn.ids.tolist() == [expected]
        assert_like_the_oracle(batch, drawn)


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
