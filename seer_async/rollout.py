"""A rollout from prompts to samples: attach engines, tokenise, open the run folder, run the core, sum up.

Invariant: everything that can be wrong with the input is found before the run folder is created, and before the first
sample is drawn; from then on nothing that was accepted is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from tokenizers import Tokenizer

from seer_async.address import require_distinct
from seer_async.core import Core
from seer_async.engine import EngineClient, engine_session
from seer_async.errors import DatasetError, EngineError, FailureKind, FleetError, StorageError, UsageError
from seer_async.events import AbortRequested, DrainRequested, GroupAdded, InputClosed, Restored
from seer_async.lengths import lengths_for
from seer_async.policies import find_policy
from seer_async.shell import TRIAL_TIMEOUT_S, Clock, Shell
from seer_async.snapshot import Snapshot, take_snapshot
from seer_async.tally import Effort, Tally, effort_of
from seer_async.text import load_tokenizer
from seer_async.trace import TraceWriter
from seer_async.types import UNKNOWN_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from seer_async.config import Config
    from seer_async.events import Record
    from seer_async.runfolder import RunFolder
    from seer_async.types import EngineInfo, Prompt

_TOKENIZE_AT_ONCE = 32
_ASK_AGAIN_S = 0.1
_TOKENIZE_TIMEOUT_S = 60.0
_TOKENIZER_TIMEOUT_S = 10.0  # of one engine: one that hangs must not use up the time of the others
_FLUSH_S = 10.0


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a rollout ended: `reason` is "done", "drained", "aborted" or "no_engine"; `summary` is that of run.json."""

    reason: str
    summary: dict[str, Any]
    path: str

    @property
    def exit_code(self) -> int:
        """What the CLI exits with."""
        if self.reason == "no_engine":
            return FleetError.exit_code
        if self.reason != "done":
            return 130
        return 3 if self.summary["failed"] else 0


class Result(Ending, frozen=True, kw_only=True):
    """The same of a rollout that has just been done; `snapshot` is its last moment, and knows of its last part only."""

    snapshot: Snapshot


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


class Rollout:
    """One run on an attached fleet.

    `drain` and `abort` may be called while `run` is awaited; `core` is for looking at.
    """

    def __init__(
        self,
        folder: RunFolder,
        fleet: Fleet,
        tokenizer: Tokenizer | None,
        *,
        watch: Callable[[Snapshot], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._fleet = fleet
        self._config = folder.config
        self._clock = Clock()
        self._lengths = lengths_for(self._config, folder.prompts)
        self._trace = self._open_trace() if self._config.output.trace else None
        self.core = Core(
            self._config,
            list(fleet.clients),
            run=folder.info.run,
            seed=folder.info.seed,
            tokenizer=tokenizer,
            lengths=self._lengths,
        )
        self._shell = Shell(
            self.core,
            fleet.clients,
            folder,
            clock=self._clock,
            tracer=self._trace,
            accepts=self._accept,
            watch=watch,
        )

    def _accept(self, name: str, info: EngineInfo) -> str | None:
        """An engine that comes back with other weights than are sampled from gets nothing until it has those."""
        sampled = {each.version for each in self.core.instances.values() if each.up} - {UNKNOWN_VERSION}
        strange = info.weight_version not in {*sampled, UNKNOWN_VERSION}
        if sampled and strange and self._config.rollout.mixed_versions == "restart":
            return f"it has weight version {info.weight_version}, others {', '.join(sorted(sampled))}"
        return self._fleet.accept(name, info)

    def _open_trace(self) -> TraceWriter:
        path = self._folder.path / "trace.json"
        try:
            trace = TraceWriter(path)
            for name in self._fleet.clients:
                trace.engine(name)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        return trace

    def drain(self) -> None:
        """Finish the chunks in flight, then stop; the run can be resumed."""
        self._shell.post(DrainRequested())

    def abort(self) -> None:
        """Stop now; the run can be resumed from its accepted chunks."""
        self._shell.post(AbortRequested())

    async def run(self, records: Sequence[Record] = (), emitted: frozenset[str] = frozenset()) -> Result:
        """Roll out to the end; `records` and `emitted` come from the run that is resumed.

        Raises:
            StorageError: The run folder cannot be written any more.
        """
        started = time.monotonic()
        self._shell.post(*(self._group(prompt) for prompt in self._folder.prompts))
        self._shell.post(*(Restored(record=record, emitted=record.request in emitted) for record in records))
        self._shell.post(InputClosed())
        reason = "failed"
        try:
            reason = await self._shell.run(self._fleet.attached)
        finally:
            snapshot = take_snapshot(self.core, self._clock.now())
            self._close(reason, snapshot, time.monotonic() - started)
        if reason == "done":
            await self._fleet.flush_pools(self.core.run)
        assert self._folder.info.summary is not None
        return Result(reason=reason, snapshot=snapshot, summary=self._folder.info.summary, path=str(self._folder.path))

    def _group(self, prompt: Prompt) -> GroupAdded:
        n = self._config.rollout.n
        room = self._fleet.info.max_model_len - len(prompt.token_ids or ())
        forced = None
        if self._config.scheduler.force_lengths:
            forced = tuple(self._lengths[f"{prompt.id}/{index}"] for index in range(n))
        return GroupAdded(prompt=prompt, n=n, limit=min(self._config.sampling.max_tokens, room), forced_lengths=forced)

    def _close(self, reason: str, snapshot: Snapshot, seconds: float) -> None:
        info = self._folder.info
        info.status, info.ended = reason, time.time()
        info.on_policy = self.core.policy.unbiased and self._folder.tally.on_policy
        info.engines = [_engine_entry(name, client) for name, client in self._fleet.clients.items()]
        info.summary = summarise(snapshot, info.earlier + effort_of(snapshot, seconds), self._folder.tally)
        try:
            if self._trace:
                self._trace.close()
            self._folder.measure(snapshot)
            self._folder.sync()
            self._folder.save()
        except OSError:
            if reason == "done":
                raise


def summarise(snapshot: Snapshot, effort: Effort, tally: Tally) -> dict[str, Any]:
    """The figures a run is judged by, of all its parts; `generated` counts tokens that were thrown away, too."""
    return {
        "samples": snapshot.total,
        "done": snapshot.done,
        "failed": snapshot.failed,
        "first_error": tally.first_error,
        "off_policy": tally.off_policy,
        "weight_versions": tally.weight_versions,
        "tokens": snapshot.tokens,
        "tokens_per_second": effort.tokens_per_second,
        **msgspec.structs.asdict(effort),
    }


def _engine_entry(name: str, client: EngineClient) -> dict[str, Any]:
    info = None if client.info is None else msgspec.to_builtins(client.info)
    return {"name": name, "url": client.url, "info": info}
