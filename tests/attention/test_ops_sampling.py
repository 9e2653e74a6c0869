"""Sampling against the oracle: the order of its steps, ties, and the random numbers every device must draw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import oracle
import pytest
from faces import FACES, Face, OpFace, OracleFace, stored

each_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)


class Drawn(NamedTuple):
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray


def sample(
    face: Face,
    logits: np.ndarray,
    counts: np.ndarray | int = 0,
    allowed: np.ndarray | None = None,
    masked: np.ndarray | bool = True,
    bias: np.ndarray | None = None,
    biased: np.ndarray | bool = True,
    **settings: np.ndarray | float,
) -> Drawn:
    """A call and the counts behind it. Settings are one number or one a row; no `allowed`, no `bias`: not read.

    What is not read is poisoned.
    """
    rows, vocabulary = logits.shape
    assert settings.keys() <= oracle.SETTINGS.keys()
    values = [
        np.array(np.broadcast_to(settings.get(name, default), rows), dtype)
        for name, (default, dtype) in oracle.SETTINGS.items()
    ]
    counts = np.array(np.broadcast_to(counts, logits.shape), dtype=np.uint16)
    mask = np.zeros((rows, -(-vocabulary // 32)), np.uint32) if allowed is None else oracle.mask_words(allowed)
    bias_read = np.broadcast_to(biased if bias is not None else False, rows)
    bias = np.full(logits.shape, np.nan) if bias is None else bias
    mask_read = np.broadcast_to(masked if allowed is not None else False, rows)
    steps = values[-1].copy()
    ids, logprobs = face.sample(logits, counts, mask, mask_read, bias, bias_read, *values)
    np.testing.assert_array_equal(values[-1], np.where(steps < 0, steps, steps + 1))
    return Drawn(ids, logprobs, counts)


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of splitmix64 from state 0, cut to 24 bits; negative seeds wrap around 2^64."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [oracle.uniform(0, step) for step in range(4)] == [(z >> 40) * 2.0**-24 for z in published]
    assert oracle.uniform(-1, 5) == oracle.uniform(2**64 - 1, 5)
    drawn = [oracle.uniform(seed, step) for seed in range(100) for step in range(100)]
    assert 0 <= min(drawn) < 1e-3 and 0.999 < max(drawn) < 1 and abs(np.mean(drawn) - 0.5) < 0.01


@each_face
def test_greedy_takes_the_first_of_the_largest(face: Face, rng: np.random.Generator) -> None:
    """Temperature 0 is the arg-max with ties to the lower id, whatever top_k, top_p and min_p say."""
    logits = stored(rng.integers(-3, 4, (40, 777)) / 2.0, "float32")
    ids, logprobs, counts = sample(face, logits, temperature=0.0, top_k=5, top_p=0.1, min_p=0.5)
    np.testing.assert_array_equal(ids, logits.argmax(axis=1))
    log_total = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(logprobs, logits.max(axis=1) - log_total, atol=2e-6)
    np.testing.assert_array_equal(np.argwhere(counts), np.stack([np.arange(40), ids], axis=1))
    assert counts.sum() == 40


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
def test_min_p_is_relative_to_the_most_probable(face: Face) -> None:
    """At least min_p times the largest probability, at the temperature; of what it keeps top_p takes its share."""
    logits = np.tile(np.log([0.5, 0.25, 0.125, 0.0625, 0.0625]), (400, 1))
    cases = [(1.0, 0.0, 1.0, 5), (1.0, 0.12, 1.0, 5), (1.0, 0.13, 1.0, 3), (1.0, 0.24, 1.0, 3), (1.0, 0.26, 1.0, 2)]
    # at temperature 2 the second has 0.71 of the first's; of the two that min_p 0.26 keeps the first has 0.67
    cases += [(1.0, 1.0, 1.0, 1), (2.0, 0.7, 1.0, 2), (2.0, 0.72, 1.0, 1), (1.0, 0.26, 0.66, 1), (1.0, 0.26, 0.68, 2)]
    for temperature, min_p, top_p, kept in cases:
        drawn = sample(face, logits, temperature=temperature, min_p=min_p, top_p=top_p, steps=np.arange(400))
        assert set(drawn.ids.tolist()) == set(range(kept)), (temperature, min_p, top_p)


@each_face
def test_min_p_and_top_k_both_hold(face: Face) -> None:
    logits = np.tile(np.log([0.4, 0.3, 0.2, 0.1]), (300, 1))
    for top_k, min_p, kept in ((2, 0.1, 2), (3, 0.6, 2), (4, 0.4, 3)):
        drawn = sample(face, logits, top_k=top_k, min_p=min_p, steps=np.arange(300))
        assert set(drawn.ids.tolist()) == set(range(kept))


@each_face
def test_repetition_penalty_looks_at_prompt_and_answer(face: Face) -> None:
    """Positive logits are divided, negative multiplied; how often a token was there does not matter."""
    logits = np.array([[2.0, 1.5, -1.0, -1.5]])
    counts = np.array([[oracle.IN_PROMPT, 0, 3, 0]])
    ids, logprobs, _ = sample(face, logits, counts, temperature=0.0, repetition_penalty=2.0)
    assert ids.tolist() == [1]
    np.testing.assert_allclose(logprobs, 1.5 - np.log(np.exp([1.0, 1.5, -2.0, -1.5]).sum()), atol=2e-6)


@each_face
def test_frequency_and_presence_penalties_look_at_the_answer_alone(face: Face) -> None:
    """logits - frequency * n - presence * (n > 0), with the prompt's tokens as they are."""
    logits = np.array([[3.0, 2.0, 1.0, 0.0]])
    counts = np.array([[oracle.IN_PROMPT, oracle.IN_PROMPT | 4, 1, 0]])
    for frequency, presence in ((0.5, 0.0), (0.0, 0.75), (0.25, -1.0), (-2.0, 2.0)):
        expected = logits[0] - frequency * np.array([0, 4, 1, 0]) - presence * np.array([0, 1, 1, 0])
        drawn = sample(face, logits, counts, temperature=0.0, frequency_penalty=frequency, presence_penalty=presence)
        assert drawn.ids.tolist() == [expected.argmax()]
        np.testing.assert_allclose(drawn.logprobs, expected.max() - np.log(np.exp(expected).sum()), atol=2e-6)


@each_face
def test_bias_comes_first_then_repetition_then_the_other_penalties(face: Face) -> None:
    """A bias that changes a logit's sign changes what repetition does to it; presence is not scaled by repetition."""
    logits, bias = np.array([[-1.0, 0.0, 5.0]]), np.array([[3.0, 0.0, -8.0]])
    settings = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.125}
    processed = np.array([(-1.0 + 3.0) / 2.0 - 0.25 - 0.125, 0.0, (5.0 - 8.0) * 2.0 - 0.25 - 0.125])
    drawn = sample(face, logits, 1 - np.eye(3)[[1]], bias=bias, temperature=0.0, **settings)
    assert drawn.ids.tolist() == [0]
    np.testing.assert_allclose(drawn.logprobs, processed[0] - np.log(np.exp(processed).sum()), atol=2e-6)


@each_face
def test_a_bias_is_read_where_its_flag_is_set(face: Face) -> None:
    logits, bias = np.tile([0.0, 1.0, 2.0], (2, 1)), np.tile([100.0, 0.0, 0.0], (2, 1))
    drawn = sample(face, logits, bias=bias, biased=np.array([True, False]), temperature=0.0)
    assert drawn.ids.tolist() == [0, 2]


@each_face
@pytest.mark.parametrize("vocabulary", [5, 32, 33, 777])
def test_a_mask_decides_before_everything(face: Face, rng: np.random.Generator, vocabulary: int) -> None:
    """What it forbids leaves the choice and the normalisation, whatever its bias; rows without a flag ignore it."""
    logits = stored(rng.standard_normal((60, vocabulary)), "float32")
    allowed = rng.random(logits.shape) < rng.choice([0.1, 0.9], (60, 1))
    allowed[np.arange(60), rng.integers(0, vocabulary, 60)] = True
    masked = rng.random(60) < 0.7
    bias = np.where(allowed, 0.0, 100.0) * masked[:, None]
    ids, logprobs, _ = sample(face, logits, temperature=0.0, allowed=allowed, masked=masked, bias=bias)
    processed = np.where(allowed | ~masked[:, None], logits, -np.inf)
    np.testing.assert_array_equal(ids, processed.argmax(axis=1))
    expected = processed.max(axis=1) - np.log(np.exp(processed).sum(axis=1))
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)
    drawn = sample(face, logits, allowed=allowed, masked=masked, steps=np.arange(60))
    assert np.isfinite(processed[np.arange(60), drawn.ids]).all()


@each_face
def test_chosen_tokens_are_counted_up_to_the_largest_count(face: Face) -> None:
    """A count keeps the bit of the prompt, and does not run over."""
    prompt, most = oracle.IN_PROMPT, oracle.LARGEST_COUNT
    before = np.array([[0, 0], [prompt, 0], [prompt | 7, 0], [most - 1, 0], [most, 0], [prompt | most, 0]])
    drawn = sample(face, np.tile([1.0, 0.0], (6, 1)), before, temperature=0.0)
    assert drawn.counts[:, 0].tolist() == [1, prompt | 1, prompt | 8, most, most, prompt | most]
    assert not drawn.counts[:, 1].any()


@each_face
def test_rows_without_a_sequence_are_left_alone(face: Face) -> None:
    """A step below 0 marks them: token 0 at 0, and neither counts nor steps change, whatever their logits are."""
    logits = np.array([[np.nan, np.nan], [0.0, 9.0], [0.0, 9.0]])
    ids, logprobs, counts = sample(face, logits, steps=np.array([-1, -(2**62), 0]), temperature=np.array([1, 0, 0]))
    assert ids.tolist() == [0, 0, 1] and logprobs.tolist()[:2] == [0.0, 0.0] and logprobs[2] < 0
    assert counts.tolist() == [[0, 0], [0, 0], [0, 1]]


def test_rows_of_no_numbers_end_in_some_token(rng: np.random.Generator) -> None:
    """NaN is never drawn beside a number; of a row that has none, or whose mask allows none, the first token comes."""
    logits = rng.standard_normal((64, 50))
    holes = rng.random((64, 50)) < 0.9
    holes[:, 7] = False
    logits[holes] = np.nan
    settings = {"temperature": rng.choice([0.0, 1.0], 64), "top_k": rng.choice([0, 20], 64), "top_p": 0.9}
    drawn = sample(OpFace(), logits, **settings, seeds=np.arange(64))
    assert not holes[np.arange(64), drawn.ids].any() and np.isfinite(drawn.logprobs).all()
    for value in (np.nan, -np.inf):
        assert not sample(OpFace(), np.full((64, 50), value), **settings, min_p=0.5).ids.any()
    assert not sample(OpFace(), np.ones((64, 50)), allowed=np.zeros((64, 50), bool), **settings).ids.any()


def test_random_settings_match_the_oracle(rng: np.random.Generator) -> None:
    """Every row of a batch has its own settings; ids equal the oracle's, log-probabilities to float32."""
    rows, vocabulary = 300, 1500
    logits = stored(4.0 * rng.standard_normal((rows, vocabulary)), "float32")
    settings = {
        "counts": np.where(rng.random(logits.shape) < 0.3, rng.choice([1, 2, 40, 0x8000, 0x8003], logits.shape), 0),
        "allowed": rng.random(logits.shape) < 0.5,
        "masked": rng.random(rows) < 0.5,
        "bias": stored(
            np.where(rng.random(logits.shape) < 0.01, 5.0 * rng.standard_normal(logits.shape), 0), "float32"
        ),
        "biased": rng.random(rows) < 0.5,
        "repetition_penalty": stored(rng.choice([1.0, 1.05, 1.3, 0.8], rows), "float32"),
        "frequency_penalty": stored(rng.choice([0.0, 0.3, -0.1], rows), "float32"),
        "presence_penalty": stored(rng.choice([0.0, 0.7, -0.2], rows), "float32"),
        "temperature": stored(rng.choice([0.0, 0.3, 0.7, 1.0, 2.0], rows), "float32"),
        "min_p": stored(rng.choice([0.0, 0.0, 0.01, 0.2], rows), "float32"),
        "top_k": rng.choice([0, 1, 2, 20, 100, 5000], rows),
        "top_p": stored(rng.choice([0.1, 0.5, 0.8, 0.95, 1.0], rows), "float32"),
        "seeds": rng.integers(-(2**62), 2**62, rows),
        "steps": rng.integers(-1000, 10000, rows),
    }
    expected, drawn = sample(OracleFace(), logits, **settings), sample(OpFace(), logits, **settings)
    np.testing.assert_array_equal(drawn.ids, expected.ids)
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_array_equal(drawn.counts, expected.counts)


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


@each_face
def test_the_most_likely_tokens_and_where_one_of_them_stands(face: Face) -> None:
    """The likeliest first, ties by id; a rank counts all tokens that are at least as likely."""
    probabilities = np.array([[0.125, 0.25, 0.125, 0.25, 0.25], [0.5, 0.125, 0.125, 0.125, 0.125]])
    logits = 7.0 + np.log(probabilities)
    top_ids, top, logprobs, ranks = face.top_logprobs(logits, np.array([2, 0]), 4)
    assert top_ids.tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]
    np.testing.assert_allclose(top, np.log(np.take_along_axis(probabilities, top_ids, 1)), atol=2e-6)
    np.testing.assert_allclose(logprobs, np.log([0.125, 0.5]), atol=2e-6)
    assert ranks.tolist() == [5, 1]


@pytest.mark.parametrize("vocabulary, k", [(1, 1), (20, 20), (1000, 5), (3001, 512)])
def test_log_probabilities_match_the_oracle(rng: np.random.Generator, vocabulary: int, k: int) -> None:
    """Many ties, NaN, and rows with nothing but it."""
    logits = stored(rng.integers(-40, 40, (30, vocabulary)) / 4.0, "float32")
    logits[:10][rng.random((10, vocabulary)) < 0.2] = np.nan
    ids = rng.integers(0, vocabulary, 30)
    expected, actual = OracleFace().top_logprobs(logits, ids, k), OpFace().top_logprobs(logits, ids, k)
    for values, same in zip(actual, expected):
        np.testing.assert_allclose(values, same, atol=1e-5)


def test_arguments_that_do_not_fit_are_named() -> None:
    logits = np.zeros((2, 40))
    with pytest.raises(ValueError, match=r"top_logprobs: k must be 1 to 40, got 41"):
        OpFace().top_logprobs(logits, np.zeros(2), 41)
    with pytest.raises(ValueError, match=r"top_logprobs: id 40 is outside the vocabulary of 40"):
        OpFace().top_logprobs(logits, np.array([0, 40]), 3)
