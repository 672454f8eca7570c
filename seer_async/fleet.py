"""The engines of a rollout or a service: attached, judged whether they can sample together, and asked for tokens.

Invariant: an engine in `attached` serves the fleet's model, is there under one name only, and can do what the sampling
options need.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec
from tokenizers import Tokenizer

from seer_async.address import require_distinct
from seer_async.engine import EngineClient, engine_session
from seer_async.errors import DatasetError, EngineError, FailureKind, FleetError, UsageError
from seer_async.monitor import TRIAL_TIMEOUT_S
from seer_async.policies import find_policy
from seer_async.text import load_tokenizer
from seer_async.types import UNKNOWN_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from seer_async.config import Config
    from seer_async.types import EngineInfo, Prompt

_TOKENIZE_AT_ONCE = 32
_ASK_AGAIN_S = 0.1
_TOKENIZE_TIMEOUT_S = 60.0
_TOKENIZER_TIMEOUT_S = 10.0  # of one engine: one that hangs must not use up the time of the others
_FLUSH_S = 10.0


class Fleet:
    """The engines of a run: clients by name, and what was learned of those that answer."""

    def __init__(self, urls: Sequence[str], connect: Callable[[str], EngineClient], config: Config) -> None:
        self.clients = {f"engine-{number}": connect(url) for number, url in enumerate(urls)}
        self.attached: dict[str, EngineInfo] = {}
        self.missing: dict[str, str] = {}
        self._connect = connect
        self._config = config
        self._divided = config.rollout.chunk_size > 0 and find_policy(config.scheduler.policy).divided

    async def attach(self, *, mixed: bool = False) -> None:
        """Attach every engine that answers; `mixed` allows their weights to differ, as does `rollout.mixed_versions`.

        Raises:
            FleetError: None can be used, or their weights differ; says why for each.
            UsageError: Two URLs are of one server, which only its answers tell.
        """
        reasons = await asyncio.gather(*(self._attach(name) for name in self.clients))
        self.missing = {name: reason for name, reason in zip(self.clients, reasons, strict=True) if reason}
        self._require_distinct()
        if not self.attached:
            said = "; ".join(f"{self.clients[name].url}: {reason}" for name, reason in self.missing.items())
            raise FleetError(f"no usable engine: {said}")
        if not mixed and self._config.rollout.mixed_versions == "restart":
            self._require_one_version()

    def _require_one_version(self) -> None:
        """Samples of two weight versions are no sample of one policy, although each is on-policy by itself."""
        versions = {name: self.attached[name].weight_version for name in self.clients if name in self.attached}
        if len(set(versions.values()) - {UNKNOWN_VERSION}) > 1:
            said = ", ".join(f"{self.clients[name].url} has {version}" for name, version in versions.items())
            raise FleetError(
                f"the engines' weights differ: {said}; give all the same, leave engines out, or allow it with "
                "--set rollout.mixed_versions=mark"
            )

    async def _attach(self, name: str) -> str | None:
        engine = self._config.engine
        try:
            info = await self.clients[name].attach(timeout_s=engine.probe_timeout_s, trial_timeout_s=TRIAL_TIMEOUT_S)
        except EngineError as error:
            return str(error)
        return self.accept(name, info)

    def accept(self, name: str, info: EngineInfo) -> str | None:
        """Take an engine that was attached into the fleet; returns why it cannot take part, or None."""
        reason = self.objection(name, info)
        if reason is None:
            self.attached[name] = info
        return reason

    def _require_distinct(self) -> None:
        for name in self.missing:
            client = self.clients[name]
            if client.info and (twin := self.twin(name, client.info)):
                raise UsageError(f"{twin} and {client.url} are the same server: give it once")

    def twin(self, name: str, info: EngineInfo) -> str | None:
        """The URL at which this server process is in the fleet already, under another name; as far as servers say."""
        others = (other for other, its in self.attached.items() if other != name and info.process == its.process != "")
        return next((self.clients[other].url for other in others), None)

    def objection(self, name: str, info: EngineInfo) -> str | None:
        """Why an engine cannot take part under this name, or None."""
        missing = self._config.sampling.required_capabilities - info.capabilities
        if self._divided and missing:
            return (
                "presence_penalty, frequency_penalty and bad_words look back over chunk borders, which this server "
                "cannot do; start it with VLLM_PLUGINS=seer, or send responses undivided with --chunk-size 0"
            )
        if twin := self.twin(name, info):
            return f"it is the same server as {twin}"
        other = next(iter(self.attached.values()), None)
        if other is not None and other.model != info.model:
            return f"it serves {info.model!r}, other engines {other.model!r}; a run needs one model"
        return None

    def add(self, name: str, url: str) -> EngineClient:
        """A client of one more engine, not attached yet."""
        self.clients[name] = self._connect(url)
        return self.clients[name]

    def remove(self, name: str) -> None:
        """Forget an engine."""
        del self.clients[name]
        self.attached.pop(name, None)

    async def look_at(self, url: str) -> EngineInfo:
        """What a server is that is not part of the fleet; sees it generate one token.

        Raises:
            EngineError: It is no vLLM server that works.
        """
        engine = self._config.engine
        return await self._connect(url).attach(timeout_s=engine.probe_timeout_s, trial_timeout_s=TRIAL_TIMEOUT_S)

    async def flush_pools(self, run: str) -> None:
        """Nobody continues what the KV pools hold of a run: leave their room to others."""
        pools = {client.info.kv_pool: client for client in self.clients.values() if client.info}
        for name, client in pools.items():
            if name is not None and self._config.engine.kv_pool:
                with suppress(EngineError):  # what stays is evicted when room is needed
                    await client.flush_pool(run, timeout_s=_FLUSH_S)

    @property
    def info(self) -> EngineInfo:
        """What the engines have in common: the first one's, with the shortest context of all."""
        infos = list(self.attached.values())
        return msgspec.structs.replace(infos[0], max_model_len=min(info.max_model_len for info in infos))

    async def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: as configured, else from the engine, else from the model's folder or hub name."""
        configured = self._config.fleet.tokenizer
        if configured:
            return load_tokenizer(configured)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self._config.engine.patience_s, _TOKENIZE_TIMEOUT_S)):
                if text := await self._tokenizer_json():
                    return Tokenizer.from_str(text)
        return load_tokenizer(self.info.root or self.info.model)

    async def _tokenizer_json(self) -> str | None:
        """What the first engine says that answers: any may have died since, and come back."""
        for name in itertools.cycle(self.attached):
            with suppress(EngineError):
                return await self.clients[name].tokenizer_json(timeout_s=_TOKENIZER_TIMEOUT_S)
            await asyncio.sleep(_ASK_AGAIN_S)
        return None

    async def tokenise(self, prompts: Sequence[Prompt], *, source: str = "") -> list[Prompt]:
        """Prompts with their token ids, by the engines' own tokenizer and chat template; `source` is their file.

        Raises:
            DatasetError: A prompt is refused, or leaves no room in the context; names its file and line.
            FleetError: No engine is left to ask.
        """
        at_once = asyncio.Semaphore(_TOKENIZE_AT_ONCE)
        clients = [self.clients[name] for name in self.attached]
        if not clients:
            raise FleetError("the fleet has no engine: add one (POST /workers) first")

        async def one(number: int, prompt: Prompt) -> Prompt:
            where = _where(prompt, source)
            if prompt.token_ids is None:
                first = number % len(clients)
                async with at_once:
                    prompt = await self._tokenised(prompt, clients[first:] + clients[:first], where)
            self._check_fit(prompt, where)
            return prompt

        return list(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))

    async def _tokenised(self, prompt: Prompt, clients: Sequence[EngineClient], where: str) -> Prompt:
        """Ask one engine after the other: one that has died since must not end the run."""
        said = ""
        for client in clients:
            try:
                ids = await client.tokenize(prompt, timeout_s=_TOKENIZE_TIMEOUT_S)
            except EngineError as error:
                if error.kind is FailureKind.REJECTED:
                    raise DatasetError(f"{where}: the engine cannot tokenise this prompt: {error}") from error
                said = str(error)
            else:
                return msgspec.structs.replace(prompt, token_ids=ids)
        raise FleetError(f"no engine tokenises prompts any more: {said}")

    def _check_fit(self, prompt: Prompt, where: str) -> None:
        ids, info = prompt.token_ids or [], self.info
        if not ids:
            raise DatasetError(f"{where}: the prompt has no tokens; give it some text")
        if len(ids) >= info.max_model_len:
            raise DatasetError(
                f"{where}: the prompt has {len(ids)} tokens, and the engines' context ends at "
                f"{info.max_model_len}; shorten it, or start engines with a larger --max-model-len"
            )
        if info.vocab_size is not None and max(ids) >= info.vocab_size:
            raise DatasetError(
                f"{where}: token id {max(ids)} is outside the model's vocabulary of {info.vocab_size}; "
                "tokenise 'prompt_token_ids' with this model's tokenizer"
            )


def _where(prompt: Prompt, source: str) -> str:
    if prompt.line and source:
        return f"{source}:{prompt.line}"  # as errors of parsing say it
    return f"line {prompt.line} (id {prompt.id!r})" if prompt.line else f"prompt {prompt.id!r}"


@asynccontextmanager
async def open_fleet(config: Config, urls: Sequence[str]) -> AsyncIterator[Fleet]:
    """Clients of the engines at `urls`, named engine-0, engine-1, ...

    Raises:
        UsageError: A URL is wrong, two are the same, or the API key is missing.
    """
    key = None
    if config.engine.api_key_env:
        key = os.environ.get(config.engine.api_key_env)
        if not key:
            raise UsageError(
                f"engine.api_key_env names {config.engine.api_key_env}, which is not set in the environment"
            )
    require_distinct(urls)
    async with engine_session() as session:
        yield Fleet(urls, lambda url: EngineClient(url, session, api_key=key), config)
