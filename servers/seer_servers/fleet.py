"""Local vLLM engines, as child processes of whoever needs a fleet on this machine.

Invariants: an engine keeps its URL through all its lives (epochs); it listens on the loopback interface only; it ends
when the fleet is left or its owner dies; one that dies is started again, a bounded number of times in a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Self

import aiohttp
import msgspec

from seer_async.errors import FleetError
from seer_servers.drafting.kinds import GROUPED, draft_options
from seer_servers.placement import GIB, Placement, place
from seer_servers.ports import HOST, Ports
from seer_servers.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from seer_servers.drafting.service import DraftService
    from seer_servers.kvpool.pool import Pool

START_TIMEOUT_S = 900.0  # a large model on a cold disk, its kernels compiled for the first time
HEALTH_POLL_S = 0.25
NEWS_S = 15.0  # between two words on engines that still start
MAX_RESTARTS = 5  # in a row
FIRST_BACKOFF_S = 1.0
STABLE_S = 600.0  # a life this long ends a row of failures

ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "seer",
    "VLLM_SERVER_DEV_MODE": "1",  # /abort_requests and weight updates; the reason to stay on loopback
}
SWITCHES = dict.fromkeys(("--enable-scale-out", "--disable-uvicorn-access-log"))
# A key would shut out the fleet's own callers, and the second overrules --kv-cache-memory-bytes.
NOT_INHERITED = ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE")


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What every engine of a local fleet serves and how; None leaves it to the place, or else to vLLM.

    `model` is a folder in Hugging Face's layout. `num_blocks` makes the KV cache exactly that many blocks of
    `block_size` tokens, whatever its size in GiB. `draft` is a kind of `seer_servers.drafting.kinds`, of at most
    `draft_tokens` at a time. `extra_args` and `extra_env` come last and so decide.
    """

    model: str
    served_name: str = "policy"
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    block_size: int = 32
    num_blocks: int | None = None
    kv_cache_gib: float | None = None
    logprobs_mode: str = "processed_logprobs"  # those of the distribution that was sampled from
    draft: str = "none"
    draft_tokens: int = 8
    extra_args: tuple[str, ...] = ()
    extra_env: dict[str, str] = {}

    @property
    def kv_bytes(self) -> int | None:
        """What the KV cache is to take, if it is said in GiB."""
        return None if self.kv_cache_gib is None else int(self.kv_cache_gib * GIB)

    def arguments(self, port: int, placement: Placement, host: str = HOST) -> list[str]:
        """Return vLLM's command-line arguments for an engine on `port`, in its place."""
        wanted = {
            "--model": self.model,
            "--served-model-name": self.served_name,
            "--dtype": self.dtype,
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--block-size": self.block_size,
            "--num-gpu-blocks-override": self.num_blocks,
            "--kv-cache-memory-bytes": self.kv_bytes,
            "--logprobs-mode": self.logprobs_mode,
        }
        given = {name: str(value) for name, value in wanted.items() if value is not None}
        drafts = draft_options(self.draft, self.draft_tokens, gpu=placement.gpu)
        options = {"--host": host, "--port": str(port)} | SWITCHES | placement.options | given | drafts
        words = [word for name, value in options.items() for word in (name, value) if word is not None]
        return [*words, *self.extra_args]


class LocalEngine:
    """One engine: a URL that lasts, and the process that serves it now.

    `state` is "starting", "up", "dead" (and about to start again) or "given up".
    """

    def __init__(
        self,
        index: int,
        port: int,
        spec: EngineSpec,
        placement: Placement,
        run_dir: Path,
        *,
        pool: Pool | None = None,
        drafts: DraftService | None = None,
    ) -> None:
        self.name = f"engine-{index}"
        self.url = f"http://{HOST}:{port}"
        self.log = run_dir / "logs" / f"{self.name}.log"
        self.epoch = 0
        self.state = "starting"
        self._index = index
        self._pool = pool
        self._drafts = drafts
        self._arguments = spec.arguments(port, placement)
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        self._env = inherited | ENV | placement.env
        self._extra_env = spec.extra_env
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process of this epoch."""
        assert self._process is not None, "start() comes first"
        return self._process

    @property
    def pid(self) -> int | None:
        """The process group of this epoch, None before the first."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start a new epoch; what is left of the last one is stopped first."""
        await self.stop()
        self.epoch += 1
        self.state = "starting"
        pooling = self._pool.arguments(self._index) if self._pool else []
        env = dict(self._env)
        for service in (self._pool, self._drafts):
            env |= service.env(self._index) if service else {}
        env |= self._extra_env
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *pooling, *self._arguments]
        self._process = await Process.start(command, env, self.log)

    async def wait_ready(self) -> None:
        """Return when this epoch answers.

        Raises:
            FleetError: The process ended, or does not answer in `START_TIMEOUT_S` seconds.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while not await self._healthy(session):
                if not self.process.alive:
                    raise FleetError(f"{self.name} ended while it started: {self.why()}")
                if time.monotonic() > deadline:
                    raise FleetError(f"{self.name} is not ready after {START_TIMEOUT_S:.0f} s: {self.why()}")
                await asyncio.sleep(HEALTH_POLL_S)
        self.state = "up"

    async def stop(self) -> None:
        """End this epoch, if there is one, and all its processes."""
        if self._process is not None:
            await self._process.stop()

    def why(self) -> str:
        """Return the last words of this epoch, and where there are more."""
        return f"{self.process.last_words()}\n(more in {self.log})"

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{self.url}/health") as reply:
                return reply.ok and self.process.alive
        return False


class LocalFleet:
    """A fleet of `count` engines, up while the `async with` block lasts; `say` is told what happens, line by line.

    `spec` is what they serve: one for all, or one for each. The engines share `pool`, if there is one, and a draft
    server, if they draft from siblings; both start before them and end after them.
    """

    def __init__(
        self,
        spec: EngineSpec | Sequence[EngineSpec],
        count: int,
        run_dir: Path,
        *,
        pool: Pool | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        specs = [spec] * count if isinstance(spec, EngineSpec) else list(spec)
        placements = place(count, specs[0].model, specs[0].kv_bytes)
        self._ports = Ports(count)
        self.pool = pool
        self.drafts = _draft_service(run_dir) if any(each.draft == GROUPED for each in specs) else None
        self.engines = [
            LocalEngine(i, self._ports[i], specs[i], placements[i], run_dir, pool=pool, drafts=self.drafts)
            for i in range(count)
        ]
        self._say = say
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> list[str]:
        """The engines' base URLs, the same for as long as the fleet lives."""
        return [engine.url for engine in self.engines]

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        self._keepers = [asyncio.create_task(self._keep(engine)) for engine in self.engines]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _start(self) -> None:
        for service in (self.pool, self.drafts):
            if service:
                await service.start()
        news = asyncio.create_task(self._tell_progress())
        failure: FleetError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for engine in self.engines:
                    group.create_task(self._start_one(engine))
        except* FleetError as errors:
            failure = _first(errors)
        finally:
            news.cancel()
        if failure is not None:  # raised here, because early Pythons 3.11 wrap what is raised in an except* in a group
            raise failure

    async def _start_one(self, engine: LocalEngine) -> None:
        started = time.monotonic()
        await engine.start()
        self._say(f"{engine.name} starts at {engine.url}, log in {engine.log}")
        await engine.wait_ready()
        self._say(f"{engine.name} is ready after {time.monotonic() - started:.0f} s")

    async def _tell_progress(self) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(NEWS_S)
            self._say(f"engines are loading the model ({time.monotonic() - started:.0f} s)")

    async def _keep(self, engine: LocalEngine) -> None:
        """Start `engine` again whenever it dies, up to `MAX_RESTARTS` times in a row."""
        failures = 0
        while True:
            ready = time.monotonic()
            await engine.process.wait()
            failures = 1 if time.monotonic() - ready > STABLE_S else failures + 1
            engine.state = "dead" if failures <= MAX_RESTARTS else "given up"
            if failures > MAX_RESTARTS:
                self._say(f"{engine.name} is given up, it died {failures} times in a row: {engine.why()}")
                return
            backoff = FIRST_BACKOFF_S * 2 ** (failures - 1)
            self._say(f"{engine.name} died and starts again in {backoff:.0f} s: {engine.why()}")
            await asyncio.sleep(backoff)
            with contextlib.suppress(FleetError):  # then it is dead again, which the next turn tells
                await self._start_one(engine)

    async def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self.engines))
        for service in (self.drafts, self.pool):
            if service:
                await service.stop()


def _first(errors: BaseExceptionGroup[FleetError]) -> FleetError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FleetError)
    return error


def _draft_service(run_dir: Path) -> DraftService:
    from seer_servers.drafting.service import DraftService  # noqa: PLC0415 - only where engines draft

    return DraftService(run_dir)
