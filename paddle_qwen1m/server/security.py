"""Who may ask: keys, the Host of a loopback server, and the type of bodies; before a byte of a body is read."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paddle_qwen1m.server.errors import ApiError
from paddle_qwen1m.server.settings import Settings

OPEN_PATHS = ("/", "/health")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses what must not reach the application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [_digest(key) for key in settings.api_keys]
        self._open_paths = (*OPEN_PATHS, "/metrics") if settings.open_metrics else OPEN_PATHS
        local = is_loopback(settings.host)
        self._hosts: tuple[str, ...] | None = (*LOCAL_NAMES, settings.host, *settings.allowed_hosts) if local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "this Host is not served on loopback: --allowed-hosts names others")
        if self._keys and scope["path"] not in self._open_paths and not self._knows(headers.get("authorization", "")):
            raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body must be application/json")

    def _knows(self, authorization: str) -> bool:
        """Compares with every key, in the same time whatever they have in common."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        return any([hmac.compare_digest(given, known) for known in self._keys]) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """Without the port, and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def exposure(settings: Settings) -> Sequence[str]:
    """Lines that warn of what a server is open to."""
    if is_loopback(settings.host) or settings.api_keys:
        return ()
    return (f"warning: {settings.host} can be reached by others and there is no --api-key: whoever reaches it may ask",)
