"""The trap of 8-bit keys: a copy of the needle checkpoint with keys as biases make them, and what caches make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import outlying_keys
import pytest
from needle_documents import Document, DocumentMaker, Encode
from paddlenlp.transformers import AutoTokenizer

TOKENS, NEEDLES, THRESHOLD = 2048, 4, 1024
PAIRS, BIAS = 6, 600.0


@pytest.fixture(scope="module")
def encode(needle_checkpoint: Path) -> Encode:
    tokenizer = AutoTokenizer.from_pretrained(str(needle_checkpoint))
    return lambda text: list(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def documents(encode: Encode) -> list[Document]:
    return [DocumentMaker(encode).make(TOKENS, NEEDLES, seed=7000)]


def test_pairs_alone_are_the_same_model(needle_checkpoint: Path, tmp_path: Path) -> None:
    """Logits of a rewritten copy without biases, to the last bits of float32."""
    outlying_keys.rewrite(needle_checkpoint, tmp_path, PAIRS, 0.0)
    prompt = np.random.default_rng(0).integers(0, 700, 900)
    original, copy = (outlying_keys.load(one, sparse=False).logits(prompt) for one in (needle_checkpoint, tmp_path))
    np.testing.assert_allclose(copy, original, rtol=0, atol=1e-4 * np.abs(original).max())
    assert any(path.read_bytes() != (needle_checkpoint / path.name).read_bytes() for path in tmp_path.glob("*.safet*"))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_int8_keeps_answers_that_rounding_keys_as_they_are_loses(
    needle_checkpoint: Path, encode: Encode, documents: list[Document], tmp_path: Path, sparse: bool
) -> None:
    outlying_keys.rewrite(needle_checkpoint, tmp_path, PAIRS, BIAS)
    kinds = ["int8"] if sparse else ["int8", "per token", "no pair scales"]
    engines = outlying_keys.kinds_of_engine(tmp_path, encode, kinds, sparse=sparse, sparse_threshold=THRESHOLD)
    right = {kind: np.mean(outlying_keys.scores(engine, documents, encode)) for kind, engine in engines}
    assert right["int8"] >= right[outlying_keys.REFERENCE] - 1 / NEEDLES
    assert right["int8"] >= 0.75
    for control in kinds[1:]:
        assert right[control] <= right["int8"] - 0.3, control
