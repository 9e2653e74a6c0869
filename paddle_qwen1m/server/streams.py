"""A stream of server-sent events: a byte at once, then one at least every few seconds, for a client that reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Callable

from starlette.types import Receive, Scope, Send

COMMENT = b": \n\n"
TICK_SECONDS = 0.25
"""How often it is looked whether the client takes what is sent."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


class EventStream:
    """A response whose body is what `source` yields, event by event.

    ping: what is sent when `ping_seconds` have passed without a byte. A client that goes away, that takes nothing for
    `client_seconds` or leaves more than `max_unread` bytes ends `source`, which closes then; `cut` says why it was cut.
    """

    def __init__(
        self,
        source: AsyncIterator[bytes],
        ping: Callable[[], bytes],
        *,
        ping_seconds: float,
        client_seconds: float,
        max_unread: int,
    ) -> None:
        self.cut: str | None = None
        self._source, self._ping = source, ping
        self._ping_seconds, self._client_seconds, self._max_unread = ping_seconds, client_seconds, max_unread
        self._unsent = bytearray(COMMENT)
        self._ended = False
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._more, self._clock, self._sent_at = asyncio.Event(), loop.time, loop.time()
        tasks = [
            asyncio.ensure_future(one)
            for one in (self._write(send), self._watch(), disconnected(receive), self._gather())
        ]
        writer, watch, gone, _ = tasks
        try:
            await asyncio.wait([writer, watch, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not writer.done():
                self.cut = self.cut or "the client went away"
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await self._source.aclose()  # type: ignore[attr-defined]
        if self.cut is not None:
            abort = scope.get("state", {}).get("abort")
            if abort is not None:
                abort()
            return
        for error in results:
            if isinstance(error, Exception):
                raise error

    async def _gather(self) -> None:
        """Takes events as they come, whether or not the client does."""
        try:
            async for piece in self._source:
                self._unsent += piece
                self._more.set()
        finally:
            self._ended = True
            self._more.set()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while self._unsent or not self._ended:
            if self._unsent:
                piece = bytes(self._unsent)
                self._unsent.clear()
                self._sending_since = self._clock()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self._sending_since, self._sent_at = None, self._clock()
            else:
                self._more.clear()
                await self._more.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self) -> None:
        """Pings where nothing was sent; returns, and `cut` says why, where the client does not take what is."""
        tick = min(TICK_SECONDS, self._ping_seconds / 4)
        while self.cut is None:
            await asyncio.sleep(tick)
            now = self._clock()
            if self._sending_since is None:
                if now + tick - self._sent_at >= self._ping_seconds:
                    self._unsent += self._ping()
                    self._more.set()
            elif now - self._sending_since >= self._client_seconds:
                self.cut = f"the client took nothing for {self._client_seconds:g} s"
            elif len(self._unsent) > self._max_unread:
                self.cut = f"the client left more than {self._max_unread} bytes unread"


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
