"""What the faces (LLM, a server) need of an engine, be it in this process or in others."""

from __future__ import annotations

from typing import Protocol

from paddle_qwen1m.engine.admission import Limits
from paddle_qwen1m.engine.core import Event, Metrics, Request
from paddle_qwen1m.engine.params import SamplingParams


class Serving(Protocol):
    """Requests go in, events come out. RuntimeError from any call but `close` once a rank has failed."""

    @property
    def limits(self) -> Limits:
        """What requests must keep to."""

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""

    @property
    def metrics(self) -> Metrics:
        """The numbers now. Any thread may ask for them."""

    def prepare(self, params: SamplingParams) -> None:
        """Compiles what answers of these params must look like, so that `add` need not. ValueError for what cannot be
        used. Any thread may call it; requests go on meanwhile.
        """

    def add(self, request: Request) -> None:
        """Lines a request up. ValueError for one that can never run, or whose id is in use."""

    def abort(self, request_id: str) -> bool:
        """Drops a request, whatever its state: no event of it comes any more. False when there is none of that id."""

    def stop(self, request_id: str, index: int, reason: int | str) -> bool:
        """Ends an answer, which has its `reason` then; tokens that were under way may still come as events."""

    def step(self) -> list[Event]:
        """Gets on with the work, for a moment; what became of requests meanwhile."""

    def reset_prefix_cache(self) -> bool:
        """Forgets every prefix. False, and nothing is forgotten, while requests run."""

    def close(self) -> None:
        """Gives back everything that it holds; again does nothing."""
