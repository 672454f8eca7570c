"""The mock's routes between text and tokens, vLLM's render and derender, and what it says of itself."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.mock.derender import DerenderBody, derendered_chat, derendered_completions
from seer_servers.mock.render import RenderChatBody, RenderCompletionBody, rendered_chat, rendered_completions
from seer_servers.mock.wire import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_servers.mock.engine import MockEngine


def scale_out_routes(engine: MockEngine) -> list[web.RouteDef]:
    """The routes."""

    def answered(kind: Any, answer: Callable[[Any, web.Request], Any]) -> Callable[[web.Request], Any]:
        async def handler(request: web.Request) -> web.Response:
            body = decode(await request.read(), kind)
            return web.Response(body=msgspec.json.encode(answer(body, request)), content_type="application/json")

        return handler

    def name(prefix: str, body: Any, request: web.Request) -> str:
        return f"{prefix}-{request.headers.get('X-Request-Id') or body.request_id or uuid.uuid4().hex}"

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"vllm_config": msgspec.to_builtins(engine.config)})

    return [
        web.get("/server_info", info),
        web.post(
            "/v1/completions/render",
            answered(RenderCompletionBody, lambda b, r: rendered_completions(b, name("cmpl", b, r), engine)),
        ),
        web.post(
            "/v1/chat/completions/render",
            answered(RenderChatBody, lambda b, r: rendered_chat(b, name("chatcmpl", b, r), engine)),
        ),
        web.post("/v1/completions/derender", answered(DerenderBody, lambda b, _: derendered_completions(b, engine))),
        web.post("/v1/chat/completions/derender", answered(DerenderBody, lambda b, _: derendered_chat(b, engine))),
    ]
