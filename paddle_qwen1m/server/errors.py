"""Errors as clients of OpenAI's interface read them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import logging
import traceback
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import Response

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "BadRequestError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "BadRequestError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """What a client is told: `status` of HTTP, a text without prompts, answers or keys, and the field it is about."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "BadRequestError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def bad(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param)


def internal(error: BaseException, *, whole: bool = False) -> ApiError:
    """What a client is told of a failure: an id, by which the log has where it happened.

    The log has no texts of exceptions, which may quote prompts, unless `whole`.
    """
    number = uuid.uuid4().hex
    if whole:
        logger.error("internal error %s", number, exc_info=error)
    else:
        places = "".join(traceback.format_tb(error.__traceback__))
        logger.error("internal error %s: %s at\n%s", number, type(error).__name__, places)
    return ApiError(500, f"internal error {number}: the server's log says where it happened")
