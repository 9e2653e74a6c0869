"""How far a long piece of work is, on stderr: a bar on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

from tqdm import tqdm

LINE_SECONDS = 5.0
LINE_SHARE = 0.05
"""Of the time so far, where that is longer: a run of hours does not fill a log."""


class Progress:
    """The work `title`, of `total` tokens or bytes (`unit`), from its making to `close`; silent unless `visible`.

    A bar stays when the work is done if it is to `stay`.

    Lines are written by a thread: a step that takes long shows that time passes. What stderr refuses is dropped.
    """

    def __init__(
        self, title: str, total: int, unit: str = "tokens", *, visible: bool = True, stay: bool = True
    ) -> None:
        self.done, self.total = 0, total
        self._title, self._unit, self._note = title, unit, ""
        self._bar: tqdm | None = None
        self._closed = threading.Event()
        self._started = time.monotonic()
        if not visible:
            self._closed.set()
        elif has_bars():
            scaled = "B" if unit == "bytes" else f" {unit}"
            self._bar = tqdm(total=total, desc=title, unit=scaled, unit_scale=True, leave=stay, file=sys.stderr)
        else:
            threading.Thread(target=self._write_lines, name="progress", daemon=True).start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def update(self, more: int) -> None:
        """So much more is done."""
        self.done += more
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(more)

    def expect(self, total: int) -> None:
        """It will be so much in all."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def note(self, note: str) -> None:
        """What is being done, where what is done grows too slowly to say so."""
        self._note = note
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str(note)

    def close(self) -> None:
        self._closed.set()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _write_lines(self) -> None:
        seconds = 0.0
        while not self._closed.wait(max(LINE_SECONDS, LINE_SHARE * seconds)):
            seconds = time.monotonic() - self._started
            with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone
                note = f", {self._note}" if self._note else ""
                line = f"{self._title}: {self._state()}, {seconds:.0f} s{self._rate(seconds)}{note}"
                print(line, file=sys.stderr, flush=True)

    def _rate(self, seconds: float) -> str:
        if self._unit != "tokens" or seconds < 1 or not self.done:
            return ""
        left = (self.total - self.done) * seconds / self.done
        return f", {self.done / seconds:,.0f} tokens/s, about {left:.0f} s left"

    def _state(self) -> str:
        share = f"{self.done / self.total:.0%}" if self.total else "0%"
        if self._unit == "bytes":
            return f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB ({share})"
        return f"{self.done:,} of {self.total:,} {self._unit} ({share})"


def has_bars() -> bool:
    """Whether stderr is a terminal, and one that does not say that it has no width."""
    try:
        if not sys.stderr.isatty():
            return False
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except ValueError:  # closed, or without a descriptor
        return not sys.stderr.closed
    except OSError:
        return True
