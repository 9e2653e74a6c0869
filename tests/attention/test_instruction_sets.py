"""The CPU ops of every instruction set this machine has, not only the widest, agree with the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = (
    "mixed_pieces and 4-2-64 or sparse_prefill and 4-2-64-float or mixed_lengths and 2-1-128 or test_probe and 7-1-128"
    " or test_linear and True or silu or test_rms_norm and 17-896 or test_rotate_queries or random_settings"
    " or test_product"
)


@pytest.mark.parametrize("isa", [pytest.param("generic", marks=pytest.mark.slow), "avx2"])
def test_narrower_instruction_sets_pass_the_same_tests(isa: str) -> None:
    """QWEN1M_CPU_ISA narrows the ops to one instruction set; a sample of the tests beside this one runs with it."""
    files = [str(path) for path in sorted(HERE.glob("test_ops_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SAMPLE, *files]
    environment = {**os.environ, "QWEN1M_CPU_ISA": isa}
    result = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
