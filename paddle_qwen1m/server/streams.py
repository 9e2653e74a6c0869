"""A stream of server-sent events: a byte at once, then one at least every few seconds, for a client that reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Callable

from starlette.types import Message, Receive, Scope, Send

COMMENT = b": \n\n"
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._more = asyncio.Event()
        tasks = [asyncio.ensure_future(one) for one in (self._write(send), self._gather(), disconnected(receive))]
        writer, _, watcher = tasks
        try:
            await asyncio.wait([writer, watcher], return_when=asyncio.FIRST_COMPLETED)
            if watcher.done() and not writer.done():
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
        await self._sent(send, {"type": "http.response.start", "status": 200, "headers": HEADERS})
        while True:
            if self._unsent:
                piece = bytes(self._unsent)
                self._unsent.clear()
                if not await self._sent(send, {"type": "http.response.body", "body": piece, "more_body": True}):
                    return
            elif self._ended:
                await self._sent(send, {"type": "http.response.body", "body": b"", "more_body": False})
                return
            else:
                self._more.clear()
                try:
                    await asyncio.wait_for(self._more.wait(), self._ping_seconds)
                except asyncio.TimeoutError:
                    self._unsent += self._ping()

    async def _sent(self, send: Send, message: Message) -> bool:
        """Sends; False, and `cut` says why, where the client does not take it."""
        sending: asyncio.Future[Any] = asyncio.ensure_future(_sending(send, message))
        deadline = asyncio.get_running_loop().time() + self._client_seconds
        try:
            while not sending.done():
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    self.cut = f"the client took nothing for {self._client_seconds:g} s"
                elif len(self._unsent) > self._max_unread:
                    self.cut = f"the client left more than {self._max_unread} bytes unread"
                if self.cut is not None:
                    return False
                await asyncio.wait([sending], timeout=min(left, 0.25))
            sending.result()
        finally:
            sending.cancel()
        return True


async def _sending(send: Send, message: Message) -> None:
    await send(message)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
