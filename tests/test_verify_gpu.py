"""tools/verify_gpu.py where there is no GPU: what it runs, what it says of each, and that its time is kept."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import verify_gpu
from verify_gpu import Outcome


def states(monkeypatch: pytest.MonkeyPatch, out: Path, names: list[str], *, seconds: float = 60) -> dict[str, str]:
    """Runs `python -c CODE` in place of each, CODE by name; what became of them."""
    code = {"sampling": "print('1 passed')", "probe": "raise SystemExit(5)", "time-int8": "raise ValueError('no')"}
    monkeypatch.setattr(
        verify_gpu, "command", lambda name: [sys.executable, "-c", code.get(name, "import time; time.sleep(99)")]
    )
    end = time.monotonic() + seconds
    return {outcome.name: outcome.state for outcome in verify_gpu.run_all(names, out, end, jobs=2)}


def test_every_file_of_tests_has_a_name_and_every_benchmark_is_there() -> None:
    assert "attention" in verify_gpu.TESTS and "paddle_generate" in verify_gpu.TESTS
    for name in (*verify_gpu.TESTS, *verify_gpu.TIMED):
        assert any(Path(word).is_file() for word in verify_gpu.command(name)), name


def test_what_passes_fails_and_skips_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = states(monkeypatch, tmp_path, ["sampling", "probe", "time-int8"])
    assert told == {"sampling": "passed", "probe": "skipped", "time-int8": "failed"}
    assert "ValueError: no" in (tmp_path / "time-int8.log").read_text(encoding="utf-8")


def test_what_is_not_done_in_time_is_ended_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = time.monotonic()
    assert states(monkeypatch, tmp_path, ["sampling", "time-step", "time-fp8"], seconds=2) == {
        "sampling": "passed",
        "time-step": "over time",
        "time-fp8": "no time left",
    }
    assert time.monotonic() - started < 10


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["verify_gpu.py", "attention", "attentoin"])
    with pytest.raises(SystemExit):
        verify_gpu.main()
    assert "there is no attentoin: choose from tests, " in capsys.readouterr().err


def test_the_line_says_how_long_and_the_last_of_the_log() -> None:
    assert (
        str(Outcome("probe", "passed", 12.34, "4 passed in 9.00s"))
        == "probe                passed         12.3 s  4 passed in 9.00s"
    )
