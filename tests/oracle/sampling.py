"""Penalties, candidates and the draw of a token."""

from __future__ import annotations

import numpy as np

from .arrays import Array, wide


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1), a multiple of 2^-24, that (seed, step) stand for: splitmix64."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (step + 1)) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 40) * 2.0**-24


IN_PROMPT, LARGEST_COUNT = 0x8000, 0x7FFF


SETTINGS: dict[str, tuple[float, type]] = {
    "repetition_penalty": (1.0, np.float32),
    "frequency_penalty": (0.0, np.float32),
    "presence_penalty": (0.0, np.float32),
    "temperature": (1.0, np.float32),
    "min_p": (0.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "seeds": (0, np.int64),
    "steps": (0, np.int64),
}
"""Of a row, in the order of the op's arguments: what changes nothing, and the type."""


def mask_words(allowed: Array) -> Array:
    """Words uint32 [rows, ceil(vocab / 32)] of which bit t % 32 of word t // 32 tells if token t of `allowed` is."""
    rows, vocabulary = allowed.shape
    padded = np.zeros((rows, -(-vocabulary // 32), 32), dtype=np.uint64)
    padded.reshape(rows, -1)[:, :vocabulary] = allowed
    return (padded << np.arange(32, dtype=np.uint64)).sum(axis=2).astype(np.uint32)


def allowed_tokens(words: Array, vocabulary: int) -> Array:
    """Whether each token is allowed by a row's mask words."""
    tokens = np.arange(vocabulary)
    return (words.astype(np.int64)[tokens // 32] >> (tokens % 32) & 1).astype(bool)


def processed_logits(
    logits: Array,
    counts: Array,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    mask: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """One row's logits [vocab] with what the mask forbids at -inf, plus the bias, after the penalties, in that order.

    NaN counts as -inf.
    """
    logits = wide(logits)
    logits = np.where(np.isnan(logits), -np.inf, logits)
    if mask is not None:
        logits = np.where(allowed_tokens(mask, len(logits)), logits, -np.inf)
    if bias is not None:
        logits = logits + bias
    counts = np.asarray(counts).astype(np.int64) & 0xFFFF
    logits = np.where(counts != 0, np.where(logits > 0, logits / repetition, logits * repetition), logits)
    in_answer = counts & LARGEST_COUNT
    return logits - frequency * in_answer - presence * (in_answer > 0)


def candidates(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> tuple[Array, Array]:
    """Ids that a draw from one row's processed logits can give, in descending probability, and their cumulative one.

    top_k 0, top_p 1 and min_p 0 are off; ties go to the lower id. The cumulative probabilities are renormalised and end
    at 1. What min_p or top_k drop has no part in the probabilities that top_p adds up.
    """
    order = np.argsort(-logits, kind="stable")
    kept = order[np.isfinite(logits[order])]
    mass = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    kept = kept[mass >= min_p][: top_k if top_k > 0 else None]
    mass = mass[: len(kept)] / mass[: len(kept)].sum()
    if top_p < 1:
        before = np.cumsum(mass) - mass
        kept = kept[: max(1, np.count_nonzero(before < top_p))]
    mass = mass[: len(kept)]
    return kept, np.cumsum(mass) / mass.sum()


def log_softmax(logits: Array) -> Array:
    """Of one row [vocab]."""
    peak = logits.max()
    return logits - peak - np.log(np.exp(logits - peak).sum())


def sample(
    logits: Array,
    counts: Array,
    mask: Array,
    masked: Array,
    bias: Array,
    biased: Array,
    repetition_penalty: Array,
    frequency_penalty: Array,
    presence_penalty: Array,
    temperature: Array,
    min_p: Array,
    top_k: Array,
    top_p: Array,
    seeds: Array,
    steps: Array,
) -> tuple[Array, Array]:
    """One token id [B] a row and its log-probability [B] before temperature, min_p, top_k and top_p.

    Ties go to the lower id. The token is the first, in descending probability, whose cumulative renormalised
    probability exceeds the uniform of (seed, step). Afterwards it is counted, and the step has grown by one. Rows with
    a step below 0 are left alone: token 0, log-probability 0.
    """
    ids, logprobs = np.zeros(len(logits), dtype=np.int64), np.zeros(len(logits))
    for row in np.flatnonzero(steps >= 0):
        step = int(steps[row])
        processed = processed_logits(
            logits[row],
            counts[row],
            float(repetition_penalty[row]),
            float(frequency_penalty[row]),
            float(presence_penalty[row]),
            mask[row] if masked[row] else None,
            bias[row] if biased[row] else None,
        )
        ids[row] = processed.argmax()
        if temperature[row] > 0:
            limits = int(top_k[row]), float(top_p[row]), float(min_p[row])
            kept, cumulative = candidates(processed, float(temperature[row]), *limits)
            chosen = np.searchsorted(cumulative, uniform(int(seeds[row]), step), side="right")
            ids[row] = kept[min(int(chosen), len(kept) - 1)]
        logprobs[row] = log_softmax(processed)[ids[row]]
        if counts[row, ids[row]] & LARGEST_COUNT < LARGEST_COUNT:
            counts[row, ids[row]] += 1
        steps[row] = step + 1
    return ids, logprobs


def top_logprobs(logits: Array, ids: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """The k most likely tokens of each row of logits [n, vocab], ties by id, and their log-probabilities [n, k] each.

    Then the log-probability [n] of the row's own token, and its rank [n]: how many are at least as likely. NaN is -inf.
    """
    logits = wide(logits)
    logits = np.where(np.isnan(logits), -np.inf, logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    logprobs = np.stack([log_softmax(row) for row in logits])
    own = np.take_along_axis(logprobs, ids[:, None], 1)
    given = np.take_along_axis(logits, ids[:, None], 1)
    return order, np.take_along_axis(logprobs, order, 1), own[:, 0], (logits >= given).sum(axis=1)
