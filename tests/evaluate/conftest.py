"""The needle checkpoint's tokenizer, and those of the server's tests that evaluations need: a server, a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from paddle_qwen1m.evaluate.samples import Prompter

sys.path.append(str(Path(__file__).parents[1] / "server"))


@pytest.fixture(scope="session")
def tokenizer(needle_checkpoint: Path) -> Any:
    from paddle_qwen1m.paddlenlp import serving

    return serving.load_tokenizer(str(needle_checkpoint), {})


@pytest.fixture(scope="session")
def prompter(tokenizer: Any) -> Prompter:
    return Prompter(tokenizer)
