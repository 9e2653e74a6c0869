"""How far long work is: lines in a file or a pipe, a bar on a terminal, and never an error."""

from __future__ import annotations

import fcntl
import io
import pty
import re
import struct
import sys
import termios
import time

import pytest

from paddle_qwen1m import progress
from paddle_qwen1m.progress import Progress


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)


def wait_for(lines: int, written: io.StringIO) -> list[str]:
    deadline = time.monotonic() + 20
    while written.getvalue().count("\n") < lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return written.getvalue().splitlines()


def test_without_a_terminal_plain_lines_come_while_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("Prefill", 65_536) as work:
        assert wait_for(1, written)[0] == "Prefill: 0 of 65,536 tokens (0%), 0 s", "before anything is done"
        work.update(16_384)
        assert wait_for(3, written)[-1] == "Prefill: 16,384 of 65,536 tokens (25%), 0 s"
    lines = written.getvalue()
    time.sleep(0.2)
    assert written.getvalue() == lines, "nothing after the end"
    assert "\r" not in lines


@pytest.mark.parametrize(("columns", "bar"), [(100, True), (0, False)])
def test_a_bar_needs_a_terminal_that_has_a_width(monkeypatch: pytest.MonkeyPatch, columns: int, bar: bool) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
    with open(follower, "w") as terminal, open(leader, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("Prefill", 100) as work:
            work.update(50)
            time.sleep(0.2)
        shown = screen.read(4096).decode()
    assert ("Prefill:  50%|" in shown or "Prefill:   0%|" in shown) == bar
    assert ("50 of 100 tokens" in shown) == (not bar)


def test_a_note_says_what_is_being_done_while_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("Calibrating", 100) as work:
        work.note("layer 0, 7 pairs measured")
        assert wait_for(2, written)[-1] == "Calibrating: 0 of 100 tokens (0%), 0 s, layer 0, 7 pairs measured"


def test_bytes_are_shown_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("Loading weights", 29_500_000_000, "bytes") as work:
        work.update(7_375_000_000)
        assert re.match(r"Loading weights: 7\.4 of 29\.5 GB \(25%\), ", wait_for(1, written)[0])


def test_lines_become_fewer_as_work_becomes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SHARE", 1.0)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("Prefill", 10):
        time.sleep(1.0)
    assert 1 <= written.getvalue().count("\n") <= 6


def test_what_is_not_to_be_seen_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("Prefill", 10, visible=False) as work:
        work.update(4)
        time.sleep(0.2)
    assert written.getvalue() == "" and work.done == 4


def test_a_stderr_that_is_gone_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with Progress("Prefill", 10) as work:
        time.sleep(0.2)
        work.update(10)
    assert work.done == 10
