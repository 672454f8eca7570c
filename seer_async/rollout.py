"""A rollout from prompts to samples, on an attached fleet: open the run folder, run the core, sum up.

Invariant: everything that can be wrong with the input is found before the run folder is created, and before the first
sample is drawn; from then on nothing that was accepted is lost.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.core import Core
from seer_async.draftgroups import DraftGroups
from seer_async.errors import FleetError, StorageError
from seer_async.events import AbortRequested, DrainRequested, GroupAdded, InputClosed, Restored
from seer_async.lengths import lengths_for
from seer_async.shell import Clock, Shell
from seer_async.snapshot import Snapshot, take_snapshot
from seer_async.tally import Effort, Tally, effort_of
from seer_async.trace import TraceWriter
from seer_async.types import UNKNOWN_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer

    from seer_async.engine import EngineClient
    from seer_async.events import Record
    from seer_async.fleet import Fleet
    from seer_async.runfolder import RunFolder
    from seer_async.types import EngineInfo, Prompt


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
        drafting = DraftGroups(self._folder.info, self._fleet.clients)
        following = asyncio.create_task(drafting.follow())
        try:
            reason = await self._shell.run(self._fleet.attached)
            following.cancel()
            await drafting.ask()
        finally:
            following.cancel()
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
        steps: list[Callable[[], None]] = [lambda: self._folder.measure(snapshot), self._folder.sync, self._folder.save]
        if self._trace:
            steps.append(self._trace.close)
        refused = [error for step in steps if (error := _attempt(step))]
        if refused and reason != "failed":  # else something worse is being raised
            raise StorageError.of(self._folder.name, refused[0])


def summarise(snapshot: Snapshot, effort: Effort, tally: Tally) -> dict[str, Any]:
    """The figures a run is judged by, of all its parts; `generated` is what was accepted, later restarts or not."""
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


def _attempt(step: Callable[[], None]) -> OSError | None:
    """Why the disk refuses one of the last steps; the others are done all the same."""
    try:
        step()
    except OSError as error:
        return error
    return None


def _engine_entry(name: str, client: EngineClient) -> dict[str, Any]:
    info = None if client.info is None else msgspec.to_builtins(client.info)
    return {"name": name, "url": client.url, "info": info}
