"""What setup.py says when it builds no GPU kernels, and when it cannot build at all."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(SETUP))


def test_a_paddle_for_cpus_gets_no_gpu_kernels(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert script["find_toolkit"](paddle_has_cuda=False) is None
    assert "no GPU kernels, because the installed Paddle is built for CPUs only" in capsys.readouterr().out


def test_without_a_cuda_toolkit_there_are_no_gpu_kernels(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script["build_cuda"], "find_toolkit", lambda: None)
    assert script["find_toolkit"](paddle_has_cuda=True) is None
    assert "no CUDA toolkit was found: put nvcc on the PATH or set CUDA_HOME" in capsys.readouterr().out


def test_a_toolkit_is_used_where_paddle_has_cuda(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script["find_toolkit"](paddle_has_cuda=True) == tmp_path


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SETUP), "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    build = subprocess.run(command, cwd=SETUP.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert build.returncode == 1
    assert "no C++ compiler (no-such-compiler) on the PATH: install g++" in build.stderr
    assert not list(tmp_path.iterdir())
