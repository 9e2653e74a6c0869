"""Fixtures that every test may use: reproducible random numbers and the checkpoint of the demo."""

from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest

import paddle_qwen1m  # noqa: F401  (before any test imports Paddle, with which threads would spin, not sleep, when idle)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Ctrl-C is Python's own, also where a shell has put the tests into the background, which makes them ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the package keeps for the user is not found by tests, nor touched."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on nothing but the name of the test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def needle_checkpoint() -> Path:
    """The trained small checkpoint that ships with the project."""
    return ROOT / "checkpoints" / "needle"
