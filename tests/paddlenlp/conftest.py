"""Fixtures for the tests of PaddleNLP's side: the loaded demo checkpoint and copies of it that a test may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
from paddlenlp.utils.log import logger

import paddle_qwen1m  # noqa: F401
from paddle_qwen1m.paddlenlp import Qwen2OneMForCausalLM


@pytest.fixture(scope="session")
def needle(needle_checkpoint: Path) -> Qwen2OneMForCausalLM:
    """The demo checkpoint; a test that changes its generation_config puts it back."""
    return AutoModelForCausalLM.from_pretrained(str(needle_checkpoint))


@pytest.fixture(scope="session")
def tokenizer(needle_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(needle_checkpoint))


@pytest.fixture
def copied_needle(tmp_path: Path, needle_checkpoint: Path) -> Callable[..., Path]:
    """Makes a copy of the demo checkpoint with some keys of config.json changed (None removes one), files left out."""

    def copy(without: tuple[str, ...] = (), **changes: Any) -> Path:
        directory = tmp_path / "copy"
        shutil.copytree(needle_checkpoint, directory, ignore=shutil.ignore_patterns(*without))
        config = json.loads((directory / "config.json").read_text())
        config.update(changes)
        kept = {key: value for key, value in config.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(kept))
        return directory

    return copy


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that PaddleNLP's logger was given, warnings and information."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logger, level, lambda message, *_: lines.append(str(message)))
    return lines
