"""What the GPU tests share: the kernels' library and fresh random numbers whose seed a failure prints."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from cuda_library import LIBRARY, CudaLibrary


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if not LIBRARY.exists():
        return f"{LIBRARY} is missing: run `python tools/cuda_library.py`"
    return None


@pytest.fixture(scope="session")
def cuda() -> CudaLibrary:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return CudaLibrary()


@pytest.fixture
def hopper(cuda: CudaLibrary) -> None:
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("products of many rows are Hopper's")


@pytest.fixture
def rng() -> Iterator[np.random.Generator]:
    """Fresh at every run; pytest shows the captured line when the test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}", file=sys.stderr)
    yield np.random.default_rng(seed)
