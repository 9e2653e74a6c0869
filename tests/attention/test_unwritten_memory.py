"""What lies in a page behind the last token is never-written memory: it changes no bit of any result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cases import PagedCache, Prompt, make_prompt
from faces import STORAGE, Face, OpFace, OracleFace

TOKENS, CHUNK_LEN = 407, 128  # inside the fourth DCA chunk and inside a page
FACES = [OracleFace(), *(OpFace(storage) for storage in STORAGE)]


def filled(prompt: Prompt) -> Iterator[Prompt]:
    """The prompt with other numbers where no token lies: NaN, infinity, zero, and what is large."""
    empty = np.isnan(prompt.cache.keys)
    for value in (np.nan, np.inf, 0.0, 3e4):
        keys, values = (np.where(empty, value, pool) for pool in prompt.cache[:2])
        fields = {**vars(prompt), "cache": PagedCache(keys, values, prompt.cache.tables)}
        yield Prompt(**fields)


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
def test_what_lies_behind_the_last_token_reaches_nothing(face: Face, rng: np.random.Generator) -> None:
    prompt = make_prompt(rng, TOKENS, CHUNK_LEN, 32, page_size=64)
    assert np.isnan(prompt.cache.keys).any()
    index = prompt.index(face, 384, TOKENS, 20, 150)
    results = []
    for variant in filled(prompt):
        keys, values, table = variant.caches
        lengths, scale = np.array([TOKENS]), np.array([variant.scale])
        decoded = face.dca_decode(variant.queries[:, -1:], keys, values, table[None], lengths, scale, CHUNK_LEN)
        probed = face.dca_probe(variant.critical[:, 384:], keys, table, TOKENS, CHUNK_LEN, variant.scale)
        sparse = variant.sparse(face, 384, TOKENS, index)
        results.append((variant.dense(face), decoded, *probed, *sparse))
    for other in results[1:]:
        for expected, got in zip(results[0], other):
            assert np.isfinite(expected).all()
            np.testing.assert_array_equal(got, expected)
