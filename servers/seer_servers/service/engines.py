"""What any engine of the fleet answers for all of them: its model, its tokenizer, its templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_servers.service.relay import Relay


class Prompted(msgspec.Struct):
    """A request that an engine understands; `model` and whatever vLLM takes."""

    model: str | None = None


class Engines:
    """The part."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    @property
    def routes(self) -> Sequence[Route]:
        """Relayed ones, and one that clients of session-aware servers call."""
        asked = [
            ("GET", "/v1/models", "The served model and its LoRA adapters"),
            ("GET", "/version", "The engines' vLLM version"),
            ("POST", "/tokenize", "Token ids of a prompt or of messages"),
            ("POST", "/detokenize", "Text of token ids"),
            ("POST", "/v1/completions/render", "Token ids and sampling parameters of a completions request"),
            ("POST", "/v1/chat/completions/render", "Token ids and sampling parameters of a chat request"),
        ]
        relayed = [
            Route(
                method=method,
                path=path,
                handler=self._relay.forward,
                summary=summary,
                body=Prompted if method == "POST" else None,
                open=path == "/version",
            )
            for method, path, summary in asked
        ]
        info = Route(
            method="GET",
            path="/server_info",
            handler=self._relay.forward,
            summary="An engine's configuration",
            query={"config_format": str},
        )
        finish = Route(
            method="POST",
            path="/finish_session",
            handler=self._finish_session,
            summary="Accepted and ignored: where a request runs is decided for each chunk",
        )
        return [*relayed, info, finish]

    async def start(self) -> None:
        """Nothing runs in the background."""

    async def stop(self) -> None:
        """Nothing runs in the background."""

    async def _finish_session(self, request: web.Request) -> web.Response:
        await request.read()
        answer: dict[str, Any] = {"status": "ok"}
        return web.json_response(answer)
