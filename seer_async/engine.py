"""The HTTP client of one engine.

Invariants: every method returns a checked value or raises `EngineError`; no redirect is followed, no compressed body is
unpacked, and no body is read beyond what a right reply can need, so a hostile engine costs one failed call. The API key
goes into the header and nowhere else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import msgspec

from seer_async.errors import EngineError, FailureKind
from seer_async.telemetry import Metrics
from seer_async.types import UNKNOWN_VERSION, EngineInfo, EngineStats
from seer_async.wire import DIALECTS, CallSpec, dialect_for, engine_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seer_async.types import ChunkReply, Prompt

_PAGE_LIMIT = 16 << 20  # a tokenizer.json is the largest control answer
_REPLY_BASE = 64 << 10
_REPLY_PER_TOKEN = 512  # bytes of JSON per token and alternative, generously
_KEEP_ALIVE_S = 2.0  # vLLM's server closes idle connections after 5 s; a call sent on one that is closing is lost
_BUSY, _UNAVAILABLE, _TIMEOUT = 429, 503, 408
_NO_KEY = (401, 403)
_LOOK, _LONGEST = 64, 300

_T = TypeVar("_T")


class Answer(msgspec.Struct, frozen=True):
    """Whatever a server says to a call; `retry_after` in seconds, if it said so."""

    status: int
    content_type: str
    body: bytes
    retry_after: float | None = None


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None  # of a LoRA adapter
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _SeerInfo(msgspec.Struct):
    boot_id: str
    model: str
    max_model_len: int
    block_size: int
    num_blocks: int
    aliases: tuple[str, ...] = ()
    root: str | None = None
    max_num_seqs: int | None = None
    vocab_size: int | None = None
    logprobs_mode: str | None = None
    max_logprobs: int = 20
    weight_version: str = UNKNOWN_VERSION
    capabilities: list[str] = []
    kv_pool: str | None = None


class _WeightInfo(msgspec.Struct):
    weight_version: str


class _DraftPage(msgspec.Struct):
    by_group: dict[str, tuple[int, int, int]] = {}


class _Tokens(msgspec.Struct):
    tokens: list[int]


def engine_session() -> aiohttp.ClientSession:
    """Return a session for all clients of a run: no limit on calls at once, no stale connections."""
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=_KEEP_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, auto_decompress=False, read_bufsize=1 << 18)


class EngineClient:
    """Calls to one vLLM server at `url`.

    `session` is shared by all engines of a run. `info` is what the engine was when it was last attached.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, *, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.info: EngineInfo | None = None

    async def attach(self, *, timeout_s: float, trial_timeout_s: float) -> EngineInfo:
        """Learn what the engine is, and see it generate one token; errors say what to do."""
        try:
            async with asyncio.timeout(timeout_s):
                info = await self._plugin_info() or await self._plain_info()
        except TimeoutError as error:
            raise EngineError(FailureKind.TIMEOUT, f"no answer within {timeout_s:g} s") from error
        except EngineError as error:
            if remedy := _remedy(error):
                raise EngineError(error.kind, f"{error}; {remedy}", status=error.status) from error
            raise
        try:
            self.info = await self._tried(info, "generate", trial_timeout_s)
        except EngineError as error:
            if error.kind is not FailureKind.REJECTED:
                raise
            self.info = await self._tried(info, "completions", trial_timeout_s)  # no --enable-scale-out there
        return self.info

    async def _tried(self, info: EngineInfo, dialect: str, timeout_s: float) -> EngineInfo:
        candidate = msgspec.structs.replace(info, dialect=dialect)
        await self.generate(_trial(candidate), candidate, timeout_s=timeout_s)
        return candidate

    async def generate(self, spec: CallSpec, info: EngineInfo, *, timeout_s: float) -> ChunkReply:
        """One chunk."""
        dialect = dialect_for(spec, info)
        tops = 1 + int(spec.params.get("logprobs", 0))
        limit = _REPLY_BASE + spec.max_tokens * tops * _REPLY_PER_TOKEN + 8 * len(spec.prefix)
        body = await self._request("POST", dialect.path, dialect.encode(spec), timeout_s, limit)
        reply = dialect.decode(body, spec)
        if reply.versions:
            return reply
        return msgspec.structs.replace(reply, version_after=await self._weight_version(timeout_s))

    async def stats(self, *, timeout_s: float) -> EngineStats:
        """One reading of the telemetry."""
        # Not gathered: asyncio.gather loses a cancellation that comes in the moment in which one of its calls fails.
        metrics = Metrics(await self._request("GET", "/metrics", None, timeout_s))
        version = await self._weight_version(timeout_s)
        return metrics.stats(boot=metrics.boot, weight_version=version)

    async def control(self, method: str, path: str, body: bytes | None = None, *, timeout_s: float) -> bytes:
        """The answer to a control call; `path` includes the query."""
        return await self._request(method, path, body, timeout_s)

    async def hand_back(self, request_ids: Iterable[str], *, timeout_s: float) -> None:
        """Have calls that are in flight, by their specs' ids, answered with what has been sampled so far."""
        assert self.info is not None
        path = DIALECTS[self.info.dialect].abort_path
        names = [name for request_id in request_ids for name in engine_names(request_id)]
        await self._request("POST", path, msgspec.json.encode({"request_ids": names}), timeout_s)

    async def pool_counters(self, *, timeout_s: float) -> dict[str, int]:
        """The numbers of the engine's KV pool (see GET /v1/seer/kv/stats); blocks, bytes, tokens, nanoseconds."""
        said = await self._json("GET", "/v1/seer/kv/stats", None, dict[str, int | str], timeout_s)
        return {name: value for name, value in said.items() if isinstance(value, int)}

    async def flush_pool(self, run: str, *, timeout_s: float) -> None:
        """Give back the room that a run's blocks take in the engine's KV pool; pools that cannot do that say so."""
        await self._json("POST", "/v1/seer/kv/flush", {"run": run}, dict[str, int], timeout_s)

    async def draft_groups(self, *, timeout_s: float) -> dict[str, tuple[int, int, int]]:
        """Of an engine's latest groups: drafts verified, their tokens, and how many of these were right."""
        return (await self._json("GET", "/v1/seer/drafts/stats", None, _DraftPage, timeout_s)).by_group

    async def tokenize(self, prompt: Prompt, *, timeout_s: float) -> list[int]:
        """Token ids of a prompt, by the engine's own tokenizer and chat template."""
        assert self.info is not None
        body: dict[str, Any] = {"model": self.info.model}
        if prompt.messages is not None:
            body |= {"messages": prompt.messages, "add_generation_prompt": True}
        else:
            body["prompt"] = prompt.text
        return (await self._json("POST", "/tokenize", body, _Tokens, timeout_s)).tokens

    async def tokenizer_json(self, *, timeout_s: float) -> str | None:
        """The engine's tokenizer.json, if it runs the Seer plug-in."""
        try:
            return (await self._request("GET", "/v1/seer/tokenizer", None, timeout_s)).decode()
        except EngineError as error:
            if error.kind is FailureKind.REJECTED:
                return None
            raise

    async def _plugin_info(self) -> EngineInfo | None:
        try:
            said = await self._json("GET", "/v1/seer/info", None, _SeerInfo, None)
        except EngineError as error:
            if error.kind is FailureKind.REJECTED:
                return None
            raise
        metrics = Metrics(await self._request("GET", "/metrics", None, None))
        return EngineInfo(
            boot=metrics.boot,
            process=said.boot_id,
            model=said.model,
            aliases=said.aliases,
            root=said.root,
            max_model_len=said.max_model_len,
            block_size=said.block_size,
            num_blocks=said.num_blocks,
            max_num_seqs=said.max_num_seqs,
            vocab_size=said.vocab_size,
            logprobs_mode=said.logprobs_mode,
            max_logprobs=said.max_logprobs,
            weight_version=said.weight_version,
            capabilities=frozenset(said.capabilities),
            shares_prefixes=metrics.shares_prefixes,
            kv_pool=said.kv_pool,
        )

    async def _plain_info(self) -> EngineInfo:
        models = await self._json("GET", "/v1/models", None, _Models, None)
        if not models.data or models.data[0].max_model_len is None:
            raise EngineError(FailureKind.BAD_REPLY, "/v1/models does not describe a vLLM model")
        metrics = Metrics(await self._request("GET", "/metrics", None, None))
        model = models.data[0]
        assert model.max_model_len is not None
        return EngineInfo(
            boot=metrics.boot,
            process=metrics.process,
            model=model.id,
            aliases=tuple(other.id for other in models.data[1:] if other.parent is None),
            root=model.root,
            max_model_len=model.max_model_len,
            block_size=metrics.cache_int("block_size"),
            num_blocks=metrics.cache_int("num_gpu_blocks"),
            shares_prefixes=metrics.shares_prefixes,
            weight_version=await self._weight_version(None) or UNKNOWN_VERSION,
        )

    async def _weight_version(self, timeout_s: float | None) -> str | None:
        try:
            return (await self._json("GET", "/weight_info", None, _WeightInfo, timeout_s)).weight_version
        except EngineError as error:
            if error.kind is FailureKind.REJECTED:
                return None  # a server without the RL control routes
            raise

    async def _json(self, method: str, path: str, body: Any, kind: type[_T], timeout_s: float | None) -> _T:
        encoded = None if body is None else msgspec.json.encode(body)
        answer = await self._request(method, path, encoded, timeout_s)
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(
                FailureKind.BAD_REPLY, f"{path} answers something else than vLLM does: {error}"
            ) from error

    async def _request(
        self, method: str, path: str, body: bytes | None, timeout_s: float | None, limit: int = _PAGE_LIMIT
    ) -> bytes:
        answer = await self.ask(method, path, body, timeout_s=timeout_s, limit=limit)
        if answer.status == 200:  # noqa: PLR2004 - HTTP
            return answer.body
        raise _status_error(answer, path)

    async def ask(
        self, method: str, path: str, body: bytes | None = None, *, timeout_s: float | None, limit: int = _PAGE_LIMIT
    ) -> Answer:
        """Ask anything, and get the answer as it is; raises EngineError only where there is none."""
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=body,
                headers=self._headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                said = await _read(response, limit)
                return Answer(
                    response.status, response.content_type, said, _seconds(response.headers.get("Retry-After"))
                )
        except TimeoutError as error:
            raise EngineError(FailureKind.TIMEOUT, f"{path} took longer than {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(FailureKind.CONNECTION, f"{path}: {error or type(error).__name__}") from error


def _trial(info: EngineInfo) -> CallSpec:
    return CallSpec(
        request_id="seer-trial",
        model=info.model,
        prefix=[1],
        params={"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "extra_args": {"seer_prompt_len": 1}},
        cache_salt="seer-trial",
        max_tokens=1,
        vocab_size=info.vocab_size,
    )


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > limit:
            response.close()
            raise EngineError(FailureKind.BAD_REPLY, f"the reply is unusable: it is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _status_error(answer: Answer, path: str) -> EngineError:
    status, retry_after = answer.status, answer.retry_after
    message = f"{path} answered {status}: {_message(answer.body)}"
    if status == _BUSY or (status == _UNAVAILABLE and retry_after is not None):
        return EngineError(FailureKind.BUSY, message, retry_after=retry_after, status=status)
    if status == _TIMEOUT:
        return EngineError(FailureKind.TIMEOUT, message, status=status)
    if 400 <= status < 500:  # noqa: PLR2004 - HTTP
        return EngineError(FailureKind.REJECTED, message, status=status)
    kind = FailureKind.SERVER if status >= 500 else FailureKind.BAD_REPLY  # noqa: PLR2004 - HTTP
    return EngineError(kind, message, status=status)


def _seconds(text: str | None) -> float | None:
    try:
        return min(60.0, max(0.0, float(text))) if text else None
    except ValueError:
        return None


def _remedy(error: EngineError) -> str:
    """What to do about a server that does not say what it is."""
    if error.status in _NO_KEY:
        return "name the environment variable that holds its API key with --set engine.api_key_env=NAME"
    if error.kind is FailureKind.CONNECTION:
        return "is it running, and the URL right?"
    if error.kind in {FailureKind.REJECTED, FailureKind.BAD_REPLY}:
        return "is this a vLLM server? Give its base URL, like http://host:8000"
    return ""


def _message(answer: bytes) -> str:
    """What an error body says, shortened and harmless to a terminal; vLLM's shape is {"error": {"message": ...}}."""
    if answer[:_LOOK].lstrip().startswith(b"<"):
        return "a page for people"
    try:
        body = msgspec.json.decode(answer)
        said = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        said = answer[:200].decode(errors="replace")
    words = " ".join(str(said)[:_LONGEST].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in words)
