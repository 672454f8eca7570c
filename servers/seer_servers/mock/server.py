"""The mock engine's HTTP face: vLLM's routes, Seer's plug-in routes, and `/mock/faults`.

Invariants: every refusal has vLLM's error shape; a client that hangs up aborts its request; with an API key the same
prefixes are guarded as by vLLM (its control routes are not, which is why both belong on loopback).
"""

from __future__ import annotations

import secrets
import time
import uuid
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from seer_async.errors import ConfigError
from seer_servers.mock.control import MockControl
from seer_servers.mock.engine import MockEngine, PauseMode
from seer_servers.mock.fault_reply import Scene
from seer_servers.mock.faults import DELIVERIES, DESCRIPTIONS, EDITS, TAKEOVERS, Faults, apply_edit
from seer_servers.mock.metrics import prometheus_text
from seer_servers.mock.reply import completion_reply, generate_reply
from seer_servers.mock.scaleout import scale_out_routes
from seer_servers.mock.tokenizer import byte_tokenizer, render_chat
from seer_servers.mock.wire import (
    AbortBody,
    ApiError,
    CompletionBody,
    DetokenizeBody,
    FaultsBody,
    GenerateBody,
    TokenizeBody,
    VersionBody,
    bad_request,
    check_model,
    completion_call,
    decode,
    generate_call,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from seer_servers.mock.config import MockConfig
    from seer_servers.mock.flight import Call, Outcome

VLLM_VERSION = "0.32.0"
"""The vLLM whose wire this is."""

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_MAX_BODY = 64 * 2**20
_SHUTDOWN_SECONDS = 1.0
_JSON = {"Content-Type": "application/json"}

_Body = TypeVar("_Body")


class MockServer:
    """One engine and its routes. `faults` are switched on from the start, by name with probability."""

    def __init__(
        self,
        config: MockConfig,
        *,
        faults: Mapping[str, float] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.config = config
        self.engine = MockEngine(config)
        self.control = MockControl(self.engine)
        self.faults = Faults(config.model.seed)
        self.faults.switch(faults or {})
        self._api_key = api_key

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, str]:
        """Listen; return the runner, whose `cleanup` stops the server, and its URL. Port 0 takes a free one."""
        runner = web.AppRunner(
            self._app(),
            handler_cancellation=True,  # aiohttp's default lets a handler run on for a client that is gone
            access_log=None,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        await runner.setup()
        site = web.TCPSite(runner, host, port, backlog=4096)
        await site.start()
        bound = runner.addresses[0][1]
        return runner, f"http://{f'[{host}]' if ':' in host else host}:{bound}"

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY)
        app.add_routes(
            [
                web.post("/inference/v1/generate", self._generate),
                web.post("/v1/completions", self._completions),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/weight_info", self._weight_info),
                web.post("/update_weight_version", self.control.noted(self._update_weight_version)),
                web.post("/pause", self.control.noted(self._pause)),
                web.post("/resume", self.control.noted(self._resume)),
                web.get("/is_paused", self._is_paused),
                web.post("/abort_requests", self.control.noted(self._abort_requests)),
                web.post("/inference/v1/abort_requests", self._abort_named),
                web.get("/v1/seer/info", self._seer_info),
                web.get("/v1/seer/tokenizer", self._seer_tokenizer),
                web.get("/v1/seer/drafts/stats", self._draft_stats),
                *scale_out_routes(self.engine),
                web.get("/mock/faults", self._get_faults),
                web.post("/mock/faults", self._set_faults),
                *self.control.routes(),
            ]
        )
        return app

    @web.middleware
    async def _guard(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Check the key, and give every error vLLM's shape."""
        if self._api_key and request.path.startswith(_GUARDED) and not self._authorized(request):
            return _json({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except ApiError as error:
            return web.Response(body=error.body, status=error.status, headers=_JSON)
        except web.HTTPException as error:
            phrase = HTTPStatus(error.status).phrase
            plain = ApiError(error.status, phrase, phrase)
            return web.Response(body=plain.body, status=error.status, headers=_JSON)

    def _authorized(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.encode(), (self._api_key or "").encode())

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request, GenerateBody)
        call = generate_call(body, f"generate-tokens-{_request_id(request, body.request_id)}", self.engine)
        return await self._answer(request, call, lambda outcome: generate_reply(outcome, call, body, self.config))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await _read(request, CompletionBody)
        call = completion_call(body, f"cmpl-{_request_id(request, body.request_id)}", self.engine)
        return await self._answer(request, call, lambda outcome: completion_reply(outcome, call, body, self.config))

    async def _answer(
        self,
        request: web.Request,
        call: Call,
        reply: Callable[[Outcome], bytes],
    ) -> web.StreamResponse:
        """Run a call and send its reply, with whatever fault is drawn for it."""
        fault = self.faults.draw()
        if fault in TAKEOVERS and (response := await TAKEOVERS[fault](request)):
            return response
        payload = reply(await self.engine.generate(call))
        self.faults.remember(request.path, call.id, payload)
        if fault in EDITS:
            payload = apply_edit(fault, payload, self._scene(request, call, reply))
        if fault in DELIVERIES:
            return await DELIVERIES[fault](request, payload)
        return web.Response(body=payload, headers=_JSON)

    def _scene(self, request: web.Request, call: Call, reply: Callable[[Outcome], bytes]) -> Scene:
        return Scene(
            max_tokens=call.sampling.max_tokens,
            vocab_size=self.config.model.vocab_size,
            older=self.faults.older(request.path, call.id),
            under=lambda weights: msgspec.json.decode(reply(self.engine.answer(call, weights))),
        )

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=prometheus_text(self.engine).encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": VLLM_VERSION})

    async def _models(self, _request: web.Request) -> web.Response:
        card = {
            "id": self.config.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.config.name,
            "parent": None,
            "max_model_len": self.config.max_model_len,
        }
        return _json({"object": "list", "data": [card, *self.control.cards()]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await _read(request, TokenizeBody)
        check_model(body.model, self.engine)
        if body.messages is not None:
            text = render_chat(body.messages, add_generation_prompt=body.add_generation_prompt)
        elif body.prompt is not None:
            text = body.prompt
        else:
            raise bad_request("Give a prompt or messages.", "prompt")
        encoded = byte_tokenizer(self.config.model.vocab_size).encode(text)
        return _json(
            {
                "count": len(encoded.ids),
                "max_model_len": self.config.max_model_len,
                "tokens": encoded.ids,
                "token_strs": encoded.tokens if body.return_token_strs else None,
            }
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await _read(request, DetokenizeBody)
        check_model(body.model, self.engine)
        tokenizer = byte_tokenizer(self.config.model.vocab_size)
        return _json({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def _weight_info(self, _request: web.Request) -> web.Response:
        return _json({"weight_version": self.engine.model.version})

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), VersionBody)
        self.engine.load_version(body.new_version)
        return _json({"success": True, "new_version": body.new_version})

    async def _pause(self, request: web.Request) -> web.Response:
        try:
            mode = PauseMode(request.query.get("mode", "abort"))
        except ValueError as error:
            raise bad_request(f"{error}: abort, wait or keep", "mode") from None
        clear_cache = request.query.get("clear_cache", "true").lower() not in ("false", "0")
        await self.engine.pause(mode, clear_cache=clear_cache)
        return _json({"status": "paused"})

    async def _resume(self, _request: web.Request) -> web.Response:
        self.engine.resume()
        return _json({"status": "resumed"})

    async def _is_paused(self, _request: web.Request) -> web.Response:
        return _json({"is_paused": self.engine.paused})

    async def _abort_requests(self, request: web.Request) -> web.Response:
        ids = decode(await request.read(), AbortBody).request_ids or []
        aborted = self.engine.abort(ids)
        return _json({"status": "aborted", "aborted": len(ids) or aborted})  # like vLLM, ids it does not know count

    async def _abort_named(self, request: web.Request) -> web.Response:
        ids = decode(await request.read(), AbortBody).request_ids
        if ids is None:
            raise bad_request("Missing 'request_ids' in request body")
        if ids:
            self.engine.abort(ids)
        return web.Response()

    async def _seer_info(self, _request: web.Request) -> web.Response:
        return _json(
            {
                "seer": version("seer-async"),
                "boot_id": self.engine.boot_id,
                "vllm": VLLM_VERSION,
                "mock": True,
                "model": self.config.name,
                "root": self.config.name,
                "max_model_len": self.config.max_model_len,
                "max_num_seqs": self.config.kv.max_num_seqs,
                "max_num_batched_tokens": self.config.max_model_len,
                "block_size": self.config.kv.block_size,
                "num_blocks": self.config.kv.num_blocks,
                "dtype": "float32",
                "vocab_size": self.config.model.vocab_size,
                "logprobs_mode": "raw_logprobs",
                "runner": "v1",
                "capabilities": ["position_seeds", "continuation", *(["drafts"] if self.engine.drafts else [])],
                "weight_version": self.engine.model.version,
            }
        )

    async def _seer_tokenizer(self, _request: web.Request) -> web.Response:
        tokenizer = byte_tokenizer(self.config.model.vocab_size)
        return web.Response(body=tokenizer.to_str().encode(), headers=_JSON)

    async def _draft_stats(self, _request: web.Request) -> web.Response:
        if self.engine.drafts is None:
            raise ApiError(404, "NotFoundError", "This engine was started without drafting.")
        return _json(self.engine.drafts.page())

    async def _get_faults(self, _request: web.Request) -> web.Response:
        return _json({"active": self.faults.active, "fired": self.faults.fired, "known": DESCRIPTIONS})

    async def _set_faults(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), FaultsBody)
        try:
            self.faults.switch(body.active)
        except ConfigError as error:
            raise bad_request(str(error), "active") from None
        return _json({"active": self.faults.active})


async def _read(request: web.Request, kind: type[_Body]) -> _Body:
    """Decode a JSON body where vLLM insists on its media type."""
    if request.content_type != "application/json":
        raise bad_request("Unsupported Media Type: Only 'application/json' is allowed")
    return decode(await request.read(), kind)


def _request_id(request: web.Request, given: str | None) -> str:
    """A header names the request before its body does, as in vLLM."""
    return request.headers.get("X-Request-Id") or given or uuid.uuid4().hex


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, headers=_JSON)
