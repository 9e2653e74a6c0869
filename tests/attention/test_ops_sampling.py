"""Sampling against the oracle: the order of its steps, ties, and the random numbers every device must draw."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from faces import FACES, Face, OpFace, OracleFace, stored

each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


def sample(face: Face, logits: np.ndarray, **settings: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probabilities and the seen marks afterwards; every setting is one number or one a row."""
    rows, vocabulary = logits.shape
    seen = np.array(settings.pop("seen", np.zeros((rows, vocabulary))), dtype=np.uint8)
    banned = np.array(settings.pop("banned", np.full((rows, 1), -1)), dtype=np.int32)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    counts = {"banned_steps": 2**62, "seeds": 0, "steps": 0}
    values = [np.array(np.broadcast_to(settings.get(n, v), rows)) for n, v in {**defaults, **counts}.items()]
    steps = values[-1].copy()
    ids, logprobs = face.sample(logits, seen, *values[:4], banned, *values[4:])
    np.testing.assert_array_equal(values[-1], steps + 1)
    return ids, logprobs, seen


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of splitmix64 from state 0, cut to 24 bits; negative seeds wrap around 2^64."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [oracle.uniform(0, step) for step in range(4)] == [(z >> 40) * 2.0**-24 for z in published]
    assert oracle.uniform(-1, 5) == oracle.uniform(2**64 - 1, 5)
    drawn = [oracle.uniform(seed, step) for seed in range(100) for step in range(100)]
    assert 0 <= min(drawn) < 1e-3 and 0.999 < max(drawn) < 1 and abs(np.mean(drawn) - 0.5) < 0.01


@each_face
def test_greedy_takes_the_first_of_the_largest(face: Face, rng: np.random.Generator) -> None:
    """Temperature 0 is the arg-max with ties to the lower id, whatever top_k and top_p say."""
    logits = stored(rng.integers(-3, 4, (40, 777)) / 2.0, "float32")
    ids, logprobs, seen = sample(face, logits, temperature=0.0, top_k=5, top_p=0.1)
    np.testing.assert_array_equal(ids, logits.argmax(axis=1))
    log_total = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(logprobs, logits.max(axis=1) - log_total, atol=2e-6)
    np.testing.assert_array_equal(np.argwhere(seen), np.stack([np.arange(40), ids], axis=1))


@each_face
def test_a_draw_walks_down_the_probabilities(face: Face) -> None:
    """The token is the first, most probable first and ties by id, whose cumulative probability exceeds the uniform."""
    probabilities = np.array([0.125, 0.5, 0.125, 0.25])
    order = [1, 3, 0, 2]
    cumulative = np.cumsum(probabilities[order])
    steps = np.arange(200)
    logits = np.tile(np.log(probabilities), (200, 1))
    ids, _, _ = sample(face, logits, seeds=7, steps=steps)
    expected = [order[int(np.argmax(cumulative > oracle.uniform(7, int(step))))] for step in steps]
    assert ids.tolist() == expected and set(expected) == {0, 1, 2, 3}


@each_face
def test_top_k_ties_keep_the_lower_ids(face: Face) -> None:
    """Of equal logits at the border of top_k the lower ids stay."""
    logits = np.tile([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], (300, 1))
    for top_k, kept in ((1, {1}), (2, {1, 3}), (4, {0, 1, 3, 4}), (6, set(range(6))), (100, set(range(6)))):
        ids, _, _ = sample(face, logits, top_k=top_k, steps=np.arange(300))
        assert set(ids.tolist()) == kept


@each_face
def test_top_p_keeps_what_precedes_the_mass(face: Face) -> None:
    """A token stays iff the mass before it is below top_p, over what top_k kept; the first always stays."""
    logits = np.tile(np.log([0.5, 0.25, 0.125, 0.0625, 0.0625]), (400, 1))
    cases = [(0, 0.49, 1), (0, 0.51, 2), (0, 0.74, 2), (0, 0.76, 3), (0, 1.0, 5), (2, 0.6, 1), (2, 0.7, 2)]
    for top_k, top_p, kept in cases:
        ids, logprobs, _ = sample(face, logits, top_k=top_k, top_p=top_p, steps=np.arange(400))
        assert set(ids.tolist()) == set(range(kept))
        np.testing.assert_allclose(logprobs, logits[0, ids], atol=2e-6)


@each_face
def test_penalty_and_bans_come_before_everything(face: Face) -> None:
    """Seen tokens: positive logits divided, negative multiplied. Banned ids leave the choice and the normalisation."""
    logits = np.array([[2.0, 1.5, -1.0, -1.5]])
    seen = np.array([[1, 0, 1, 0]])
    ids, logprobs, _ = sample(face, logits, temperature=0.0, seen=seen, repetition_penalty=2.0)
    penalised = np.array([1.0, 1.5, -2.0, -1.5])
    assert ids.tolist() == [1]
    np.testing.assert_allclose(logprobs, 1.5 - np.log(np.exp(penalised).sum()), atol=2e-6)
    banned = np.array([[1, -1, 0]])
    ids, logprobs, marks = sample(face, logits, temperature=0.0, seen=seen, repetition_penalty=2.0, banned=banned)
    assert ids.tolist() == [3] and marks.tolist() == [[1, 0, 1, 1]]
    np.testing.assert_allclose(logprobs, -1.5 - np.log(np.exp(penalised[2:]).sum()), atol=2e-6)


@each_face
def test_bans_hold_while_the_step_is_below_theirs(face: Face) -> None:
    """From banned_steps on the banned ids are free."""
    logits, steps = np.tile([0.0, 2.0, 1.0], (6, 1)), np.arange(6)
    ids, _, _ = sample(face, logits, temperature=0.0, banned=np.tile([1, -1], (6, 1)), banned_steps=4, steps=steps)
    assert ids.tolist() == [2, 2, 2, 2, 1, 1]


def test_random_settings_match_the_oracle(rng: np.random.Generator) -> None:
    """Every row of a batch has its own settings; ids equal the oracle's, log-probabilities to float32."""
    rows, vocabulary = 300, 1500
    logits = stored(4.0 * rng.standard_normal((rows, vocabulary)), "float32")
    settings = {
        "temperature": stored(rng.choice([0.0, 0.3, 0.7, 1.0, 2.0], rows), "float32"),
        "top_k": rng.choice([0, 1, 2, 20, 100, 5000], rows),
        "top_p": stored(rng.choice([0.1, 0.5, 0.8, 0.95, 1.0], rows), "float32"),
        "repetition_penalty": stored(rng.choice([1.0, 1.05, 1.3, 0.8], rows), "float32"),
        "seen": rng.random((rows, vocabulary)) < 0.3,
        "banned": np.where(rng.random((rows, 4)) < 0.5, rng.integers(0, vocabulary, (rows, 4)), -1),
        "banned_steps": rng.integers(0, 10000, rows),
        "seeds": rng.integers(-(2**62), 2**62, rows),
        "steps": rng.integers(0, 10000, rows),
    }
    expected_ids, expected_logprobs, expected_seen = sample(OracleFace(), logits, **settings)
    ids, logprobs, seen = sample(OpFace(), logits, **settings)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)
    np.testing.assert_array_equal(seen, expected_seen)


def test_a_draw_depends_on_nothing_but_its_own_row(rng: np.random.Generator) -> None:
    """The same row gives the same token alone and in any batch."""
    logits = stored(rng.standard_normal((8, 300)), "float32")
    seeds, steps = np.arange(8), 3 + np.arange(8)
    together, _, _ = sample(OpFace(), logits, seeds=seeds, steps=steps)
    alone = [sample(OpFace(), logits[r : r + 1], seeds=seeds[r], steps=steps[r])[0][0] for r in range(8)]
    assert together.tolist() == alone


def test_a_full_vocabulary_with_one_candidate_left(rng: np.random.Generator) -> None:
    """152064 logits of which all but one are banned by -inf already: the remaining one, at log-probability 0."""
    logits = np.full((2, 152064), -np.inf)
    logits[0, 152063], logits[1, 0] = -4.0, 3.0
    ids, logprobs, _ = sample(OpFace(), logits, temperature=np.array([0.0, 0.7]), top_k=20, top_p=0.8)
    assert ids.tolist() == [152063, 0] and logprobs.tolist() == [0.0, 0.0]
