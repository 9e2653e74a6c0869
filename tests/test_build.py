"""What setup.py says when it builds no GPU kernels or nothing, a package when it is hidden, make when it is asked."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


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


def test_every_folder_of_the_package_is_installed() -> None:
    listed = re.findall(r'"(paddle_qwen1m(?:\.\w+)*)",\n', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "paddle_qwen1m").rglob("*.py")}
    assert set(listed) == {*folders, "paddle_qwen1m.configs"}


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "default", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_a_source_tree_that_hides_the_installed_package_says_so(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    built = shutil.ignore_patterns("_ops.so", "__pycache__")
    shutil.copytree(ROOT / "paddle_qwen1m", tree / "paddle_qwen1m", ignore=built)
    shutil.copytree(ROOT / "configs", tree / "configs")
    (site / "paddle_qwen1m").mkdir(parents=True)
    (site / "paddle_qwen1m" / "_ops.so").touch()
    (site / "paddle_qwen1m-0.1.0.dist-info").mkdir()
    (site / "paddle_qwen1m-0.1.0.dist-info" / "METADATA").write_text("Name: paddle-qwen1m\nVersion: 0.1.0\n")
    code = "from paddle_qwen1m import ops; ops.load()"
    hidden = python(code, cwd=tree, env={**os.environ, "PYTHONPATH": str(site)})
    assert f"this source tree hides the package that is installed in {site / 'paddle_qwen1m'}: start" in hidden.stderr
    alone = python(code, cwd=tree, env={**os.environ, "PYTHONPATH": ""})
    assert "the custom ops were not built; run `pip install . --no-build-isolation`" in alone.stderr


def test_paddles_advice_to_builders_of_extensions_is_not_shown() -> None:
    done = python("import paddle_qwen1m, paddle, setuptools", env={**os.environ, "PATH": ""})
    assert "ccache" not in done.stderr and "distutils" not in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_help_lists_every_target() -> None:
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split()
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(["make", "help"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60).stdout
    assert [line.split()[1] for line in shown.splitlines()] == targets


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_clean_takes_along_what_the_demo_wrote() -> None:
    shown = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert {"out", ".venv", "build"} <= set(shown.split())


def test_a_kernel_that_would_be_slow_does_not_compile(script: dict[str, Any]) -> None:
    """One whose products are serialised, or whose registers are spilled for the architecture that it is meant for."""
    is_slow = script["build_cuda"].is_slow
    serial = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    begin = "ptxas info    : Compiling entry function '_Z1k1a' for '{}'\n"
    begin += "ptxas info    : Function properties for _Z1k1a\n"
    spilled = begin + "    88 bytes stack frame, 224 bytes spill stores, 296 bytes spill loads\n"
    fine = begin + "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    fine += "ptxas info    : Used 168 registers, used 16 barriers\n"
    assert is_slow(serial + fine.format("sm_90a"), ["sm_90a"])
    assert is_slow(fine.format("sm_90a") + spilled.format("sm_90a"), ["sm_80", "sm_90a"])
    assert not is_slow(spilled.format("sm_90a") + fine.format("sm_80"), ["sm_80"])
    assert not is_slow(
        "ptxas info    : 0 bytes gmem\n" + fine.format("sm_80") + fine.format("sm_90a"), ["sm_80", "sm_90a"]
    )
