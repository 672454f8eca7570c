"""Questions that any engine answers alike: ask one that is up, on failure the next, and give the answer as it is."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from seer_async.errors import EngineError
from seer_servers.service.bodies import decode
from seer_servers.service.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from seer_async.engine import Answer, EngineClient
    from seer_async.service import Service

_TIMEOUT_S = 60.0
_RETRY_S = 1.0
_LIMIT = 256 << 20  # a request of thousands of prompts comes back rendered
_NOT_OURS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)  # our key for the engine is wrong, not the client's for us

_Kind = TypeVar("_Kind")


class Relay:
    """Asks engines in turn."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turn = 0

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """The answer of the first engine that has one; raises ApiError (503) if none has."""
        said, failed = "none is up", None
        for client in self._clients():
            try:
                answer = await client.ask(method, path, body, timeout_s=_TIMEOUT_S, limit=_LIMIT)
            except EngineError as error:
                said = str(error)
                continue
            if answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and answer.status not in _NOT_OURS:
                return answer
            failed = answer
            said = f"{path} answered {answer.status}"
        if failed and failed.status not in _NOT_OURS:
            return failed
        raise ApiError(503, f"no engine answers: {said}", retry_after=_RETRY_S)

    async def fetch(self, path: str, body: bytes, kind: type[_Kind]) -> _Kind:
        """The decoded answer to a POST; an error status is raised as it came."""
        answer = await self.ask("POST", path, body)
        if answer.status != HTTPStatus.OK:
            raise RelayedError(answer, path)
        return decode(answer.body, kind)

    async def forward(self, request: web.Request) -> web.Response:
        """A handler: what an engine answers to the very same request."""
        body = await request.read() or None  # read before: `can_read_body` no longer tells
        return response_of(await self.ask(request.method, request.rel_url.raw_path_qs, body), request.path)

    def _clients(self) -> Iterator[EngineClient]:
        names = [name for name, instance in self._service.core.instances.items() if instance.up]
        self._turn += 1
        first = self._turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            yield self._service.client(name)


class RelayedError(ApiError):
    """An engine's refusal, with its own status and body."""

    def __init__(self, answer: Answer, path: str) -> None:
        super().__init__(answer.status, f"{path} answered {answer.status}")
        self._answer, self._path = answer, path

    def response(self) -> web.Response:
        """The engine's own answer."""
        return response_of(self._answer, self._path)


def response_of(answer: Answer, path: str) -> web.Response:
    """An engine's answer as ours."""
    if answer.status == HTTPStatus.NOT_FOUND and b'"error"' not in answer.body:
        missing = f"the engines have no {path}: start them with --enable-scale-out (and VLLM_SERVER_DEV_MODE=1)"
        return ApiError(501, missing).response()
    headers: dict[str, Any] = {"Retry-After": f"{answer.retry_after:g}"} if answer.retry_after else {}
    return web.Response(body=answer.body, status=answer.status, content_type=answer.content_type, headers=headers)
