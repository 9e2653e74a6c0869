"""The engine in a thread of its own: requests go in from the event loop, events come back to it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Callable

from paddle_qwen1m.engine import Event, Finished, Metrics, Request, SamplingParams
from paddle_qwen1m.engine.admission import Limits
from paddle_qwen1m.engine.interface import Serving

IDLE_SECONDS = 1.0
"""How often an engine without work is stepped: it raises then when a rank has died."""
LOADING, READY, FAILED, CLOSED = "loading", "ready", "failed", "closed"


class EngineGone(RuntimeError):
    """The engine is not there: it is still loading, was closed, or has failed."""


class Refused(ValueError):
    """The engine cannot serve a request, and says why."""


class Ticket:
    """A request under way. Its events gather here; `notify` is set when it is taken, has some, or an error."""

    def __init__(self, request: Request, notify: asyncio.Event) -> None:
        self.request = request
        self.is_taken = self.has_started = self.is_over = False
        """Taken when the engine has accepted it, over when that holds nothing of it any more."""
        self._notify = notify
        self._events: deque[Event] = deque()
        self._error: Exception | None = None

    def check(self) -> None:
        """Raises Refused, EngineGone when the engine has failed, or what else the engine could not take it for."""
        if self._error is not None:
            raise self._error

    def take(self) -> list[Event]:
        """The events since the last call; raises as `check` does."""
        self.check()
        events = list(self._events)
        self._events.clear()
        return events

    def taken(self) -> None:
        self.is_taken = True
        self._notify.set()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._notify.set()

    def fail(self, error: Exception) -> None:
        self.is_over, self._error = True, error
        self._notify.set()


Order = Callable[[Serving], object]


class EngineThread:
    """Loads an engine by `load`, in its thread, and runs it there. Methods are the event loop's, but where they say so.

    on_failure: called in the loop when the engine, or its loading, has failed; its requests have their error then.
    """

    def __init__(self, load: Callable[[], Serving], on_failure: Callable[[Exception], None] | None = None) -> None:
        self.state = LOADING
        self.error: Exception | None = None
        self.num_waiting = self.waiting_tokens = 0
        self._load, self._on_failure = load, on_failure
        self._limits: Limits | None = None
        self._engine: Serving | None = None
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def limits(self) -> Limits:
        """What requests must keep to. EngineGone unless the engine is ready."""
        if self.state != READY or self._limits is None:
            raise EngineGone(f"the engine is {self.state}")
        return self._limits

    @property
    def num_running(self) -> int:
        """Requests that have begun and of which the engine still holds something."""
        return len(self._tickets) - self.num_waiting

    def metrics(self) -> Metrics:
        """The engine's own numbers, zeros where there is none. For any thread but the event loop's: it may wait."""
        engine = self._engine
        if engine is not None and self.state == READY:
            with contextlib.suppress(RuntimeError):
                return engine.metrics
        return Metrics()

    def prepare(self, params: SamplingParams) -> None:
        """Compiles what answers of these params must look like. For any thread but the event loop's: it takes a while.

        ValueError for what cannot be used, EngineGone unless the engine is ready.
        """
        engine = self._engine
        if engine is None:
            raise EngineGone(f"the engine is {self.state}")
        try:
            engine.prepare(params)
        except RuntimeError as error:
            raise EngineGone("the engine has failed") from error

    def start(self) -> None:
        self._loop, self._loaded = asyncio.get_running_loop(), asyncio.Event()
        self._thread.start()

    async def loaded(self) -> None:
        """Returns when the engine is ready, or has failed."""
        await self._loaded.wait()

    def submit(self, request: Request, notify: asyncio.Event) -> Ticket:
        """Hands a request over. EngineGone unless the engine is ready."""
        self.limits  # noqa: B018  (raises)
        ticket = Ticket(request, notify)
        self._tickets[request.id] = ticket
        self._count_waiting(ticket, 1)
        self._orders.put(lambda engine: self._add(engine, ticket))
        return ticket

    def stop(self, ticket: Ticket, index: int, reason: int | str) -> None:
        """Ends an answer."""
        if not ticket.is_over:
            self._orders.put(lambda engine: engine.stop(ticket.request.id, index, reason))

    def abort(self, ticket: Ticket) -> None:
        """Drops a request, if it is still there."""
        if not ticket.is_over:
            ticket.is_over = True
            self._orders.put(lambda engine: self._abort(engine, ticket))

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix, unless requests run."""
        self._orders.put(lambda engine: engine.reset_prefix_cache())

    async def close(self) -> None:
        """Closes the engine; what still runs has an error."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)
        if self.state != FAILED:
            self.state = CLOSED
        self._fail_all(EngineGone("the server is shutting down"))

    # --- the thread ---

    def _run(self) -> None:
        engine: Serving | None = None
        try:
            engine = self._engine = self._load()
            self._tell(self._ready, engine.limits)
            while self._obey(engine):
                events = engine.step()
                if events:
                    self._tell(self._deliver, events)
        except Exception as error:
            self._tell(self._failed, error)
        finally:
            if engine is not None:
                engine.close()

    def _obey(self, engine: Serving) -> bool:
        """Carries out what was asked for; waits for that a while if the engine has nothing to do. False to end."""
        wait = engine.is_idle
        while True:
            try:
                order = self._orders.get(wait, IDLE_SECONDS)
            except queue.Empty:
                return True
            if order is None:
                return False
            order(engine)
            wait = False

    def _add(self, engine: Serving, ticket: Ticket) -> None:
        try:
            engine.add(ticket.request)
        except ValueError as error:
            self._tell(self._dropped, ticket, Refused(str(error)))
        except RuntimeError:  # the engine has failed
            raise
        except Exception as error:
            self._tell(self._dropped, ticket, error)
        else:
            self._tell(ticket.taken)

    def _abort(self, engine: Serving, ticket: Ticket) -> None:
        engine.abort(ticket.request.id)
        self._tell(self._forget, ticket)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    # --- what the thread tells, in the loop ---

    def _ready(self, limits: Limits) -> None:
        self.state, self._limits = READY, limits
        self._loaded.set()

    def _failed(self, error: Exception) -> None:
        self.state, self.error = FAILED, error
        self._loaded.set()
        self._fail_all(EngineGone("the engine has failed"))
        if self._on_failure is not None:
            self._on_failure(error)

    def _fail_all(self, error: Exception) -> None:
        for ticket in list(self._tickets.values()):
            self._forget(ticket)
            ticket.fail(error)

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            ticket = self._tickets.get(event.id)
            if ticket is None:
                continue
            if not ticket.has_started:
                self._count_waiting(ticket, -1)
                ticket.has_started = True
            if isinstance(event, Finished):
                ticket.is_over = True
                self._forget(ticket)
            ticket.put(event)

    def _dropped(self, ticket: Ticket, error: Exception) -> None:
        self._forget(ticket)
        ticket.fail(error)

    def _forget(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.request.id, None) is not None and not ticket.has_started:
            self._count_waiting(ticket, -1)

    def _count_waiting(self, ticket: Ticket, sign: int) -> None:
        self.num_waiting += sign
        self.waiting_tokens += sign * len(ticket.request.prompt)
