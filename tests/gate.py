"""Something that stands before a method's calls until it is opened."""

from __future__ import annotations

import threading
from typing import Any

import pytest


class Gate:
    """Stands before every call of a method, until it is opened; `reached`: whether there was one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        original = getattr(kind, method)

        def waiting(this: Any, *arguments: Any) -> Any:
            self.reached.set()
            assert self._open.wait(20)
            return original(this, *arguments)

        monkeypatch.setattr(kind, method, waiting)

    def open(self) -> None:
        self._open.set()
