"""The HTTP application: parts put together behind one address, and what protects them.

Invariants: every error has vLLM's shape; a route that is not `open` runs only with a valid key; a handler whose client
hangs up, or does not take what is written, is cancelled; nothing is read beyond the limits of the config.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from seer_servers.listening import cannot_listen
from seer_servers.service.errors import ApiError
from seer_servers.service.explain import explained
from seer_servers.service.openapi import document
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from seer_async.config import ServeConfig
    from seer_servers.service.keys import Keys
    from seer_servers.service.part import Handler, Part

_BACKLOG = 4096
_LINE, _HEADERS = 8190, 100  # bytes of a header line, and their number
_REQUEST_ID = "X-Request-Id"
_MIB = 1 << 20
_STALL_S, _LEAST = 10.0, 64 << 10  # a body that is not there yet must bring so many bytes in so many seconds
_LINGER_S = 2.0  # for a client that is still sending to read that its body is refused


class App:
    """The application of `parts`."""

    def __init__(self, config: ServeConfig, keys: Keys, parts: Sequence[Part]) -> None:
        self._config = config
        self._keys = keys
        self._parts = parts
        self._most = int(config.max_body_mib * _MIB)
        own = Route(method="GET", path="/openapi.json", handler=self._openapi, summary="This document", open=True)
        self.routes = [*(route for part in parts for route in part.routes), own]
        self._open = {(route.method, route.path) for route in self.routes if route.open}
        self._unheard: set[web.RequestHandler] = set()
        self._document = msgspec.json.encode(document(self.routes))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve inside the block, at the URL it gets; its end waits for what is open.

        Raises:
            UsageError: The address is taken.
        """
        config = self._config
        runner = web.AppRunner(
            self._application(),
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=config.keep_alive_s,
            shutdown_timeout=config.shutdown_s,
            lingering_time=_LINGER_S,
            max_line_size=_LINE,
            max_field_size=_LINE,
            max_headers=_HEADERS,
        )
        await runner.setup()
        server = await self._listen(runner)
        try:
            for part in self._parts:
                await part.start()
            host, port = server.sockets[0].getsockname()[:2]
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            server.close()
            await runner.cleanup()
            for part in reversed(self._parts):
                await part.stop()

    async def _listen(self, runner: web.AppRunner) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        host, port = self._config.host, self._config.port
        accept = runner.server
        assert accept is not None

        def connected() -> asyncio.Protocol:
            protocol = accept()
            self._unheard.add(protocol)
            loop.call_later(self._config.keep_alive_s, self._hang_up, protocol)
            return protocol

        try:
            server = await loop.create_server(connected, host, port, backlog=_BACKLOG)
        except OSError as error:
            await runner.cleanup()
            raise cannot_listen(host, port, error) from error
        for listener in server.sockets:  # the connections inherit it: who takes nothing for so long is gone
            with socket.socket(fileno=os.dup(listener.fileno())) as same:  # uvloop's has no options
                same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._config.unread_s))
        return server

    def _hang_up(self, protocol: web.RequestHandler) -> None:
        """Close a connection that has not sent a whole request head by now; aiohttp watches only later ones."""
        if protocol in self._unheard:
            self._unheard.discard(protocol)
            if protocol.transport:
                protocol.transport.close()

    def _application(self) -> web.Application:
        app = web.Application(
            middlewares=[_explained, self._guarded, self._read],
            client_max_size=self._most,
        )
        for route in self.routes:
            app.router.add_route(route.method, route.path, route.handler)
        app.on_response_prepare.append(_echo)
        return app

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for a key."""
        self._unheard.discard(request.protocol)
        resource = request.match_info.route.resource
        place = (request.method, resource.canonical if resource else "")
        if place not in self._open and not self._keys.accept(request.headers.get("Authorization", "")):
            return web.json_response({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)
        return await handler(request)

    @web.middleware
    async def _read(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Read the body, which must not take forever; handlers find it read."""
        if request.can_read_body:
            if (request.content_length or 0) > self._most:
                raise ApiError(413, f"a body may have {self._config.max_body_mib:g} MiB (serve.max_body_mib)")
            try:
                async with asyncio.timeout(self._config.body_timeout_s):
                    await _arrived(request)
            except TimeoutError:
                limit = f"{self._config.body_timeout_s:g} s, or was too slow"
                raise ApiError(408, f"the body did not arrive within {limit}") from None
        return await handler(request)


async def _arrived(request: web.Request) -> None:
    """Read the body; raises TimeoutError if it only trickles in."""
    if request.content.is_eof():
        await request.read()
        return
    reading = asyncio.ensure_future(request.read())
    try:
        while True:
            before = request.content.total_bytes
            await asyncio.wait([reading], timeout=_STALL_S)
            if reading.done():
                reading.result()  # raises if it is too large
                return
            if request.content.total_bytes - before < _LEAST:
                raise TimeoutError
    finally:
        reading.cancel()


@web.middleware
async def _explained(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every error vLLM's shape."""
    try:
        return await handler(request)
    except ConnectionError:
        raise  # nobody is there to be told
    except Exception as error:  # noqa: BLE001 - a client is told of a defect, too
        return explained(error).response()


async def _echo(request: web.Request, response: web.StreamResponse) -> None:
    """Send the client's own name of the request back."""
    if (name := request.headers.get(_REQUEST_ID, "")) and name.isascii():
        response.headers[_REQUEST_ID] = name
