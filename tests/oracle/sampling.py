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


def processed_logits(logits: Array, seen: Array, penalty: float, banned: Array) -> Array:
    """One row's logits [vocab] after the penalty over seen tokens, with banned ids at -inf (entries of -1: none)."""
    logits = wide(logits)
    logits = np.where(seen.astype(bool), np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits[banned[banned >= 0]] = -np.inf
    return logits


def candidates(logits: Array, temperature: float, top_k: int, top_p: float) -> tuple[Array, Array]:
    """Ids that a draw from one row's processed logits can give, in descending probability, and their cumulative one.

    top_k 0 and top_p 1 are off; ties go to the lower id. The cumulative probabilities are renormalised and end at 1.
    """
    order = np.argsort(-logits, kind="stable")
    kept = order[np.isfinite(logits[order])][: top_k if top_k > 0 else None]
    mass = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    mass /= mass.sum()
    if top_p < 1:
        before = np.cumsum(mass) - mass
        kept = kept[: max(1, np.count_nonzero(before < top_p))]
    mass = mass[: len(kept)]
    return kept, np.cumsum(mass) / mass.sum()


def sample(
    logits: Array,
    seen: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    repetition_penalty: Array,
    banned: Array,
    banned_steps: Array,
    seeds: Array,
    steps: Array,
) -> tuple[Array, Array]:
    """One token id [B] a row and its log-probability [B] before temperature, top_k and top_p.

    Penalty over seen tokens, banned ids to -inf (entries of -1 mean none) while the step is below banned_steps,
    temperature (0: arg-max), top_k (0: off), top_p; ties go to the lower id. The token is the first, in descending
    probability, whose cumulative renormalised probability exceeds the uniform of (seed, step). Afterwards it is marked
    in seen, and the steps have grown by one.
    """
    ids = np.empty(len(logits), dtype=np.int64)
    logprobs = np.empty(len(logits))
    for row in range(len(logits)):
        step = int(steps[row])
        bans = banned[row] if step < banned_steps[row] else banned[row, :0]
        processed = processed_logits(logits[row], seen[row], float(repetition_penalty[row]), bans)
        ids[row] = processed.argmax()
        if temperature[row] > 0:
            kept, cumulative = candidates(processed, float(temperature[row]), int(top_k[row]), float(top_p[row]))
            chosen = np.searchsorted(cumulative, uniform(int(seeds[row]), step), side="right")
            ids[row] = kept[min(int(chosen), len(kept) - 1)]
        peak = processed.max()
        logprobs[row] = processed[ids[row]] - peak - np.log(np.exp(processed - peak).sum())
        seen[row, ids[row]] = 1
        steps[row] = step + 1
    return ids, logprobs
