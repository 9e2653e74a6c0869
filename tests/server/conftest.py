"""Servers for tests, and the tokenizer of the small checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from paddlenlp.transformers import AutoTokenizer
from serving import CHECKPOINT, Server, serve

import paddle_qwen1m  # noqa: F401  (registers the tokenizer)
from paddle_qwen1m.server.texts import Texts


@pytest.fixture(scope="session")
def texts() -> Texts:
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    return Texts(AutoTokenizer.from_pretrained(str(CHECKPOINT)), config)


@pytest.fixture
def server(texts: Texts) -> Iterator[Server]:
    """With the bounds that hold by default."""
    with serve(texts, FakeEngine()) as one:
        yield one
