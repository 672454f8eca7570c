"""Errors as vLLM says them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from aiohttp import web


class ApiError(Exception):
    """Ends a request with an error; handlers raise it, the application answers it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, kind: str | None = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind or _KINDS.get(status, HTTPStatus(status).phrase.replace(" ", "") + "Error")
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}
        )

    def response(self) -> web.Response:
        """The answer."""
        headers = {"Retry-After": f"{max(1, round(self.retry_after))}"} if self.retry_after else {}
        return web.Response(body=self.body, status=self.status, content_type="application/json", headers=headers)


_KINDS = {400: "BadRequestError", 404: "NotFoundError", 429: "RateLimitError", 500: "InternalServerError"}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param)
