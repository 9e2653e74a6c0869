"""Fixtures that every test may use: reproducible random numbers and the checkpoint of the demo."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on nothing but the name of the test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def needle_checkpoint() -> Path:
    """The trained small checkpoint that ships with the project."""
    return ROOT / "checkpoints" / "needle"
