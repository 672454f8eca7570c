"""What an observer who sees only events and executed commands can demand of any orchestrator.

Invariants it holds the core to, over all its incarnations:
- a `Record` answers a reply to an open call, and holds that reply's tokens, up to a stop string;
- a `Dispatch` goes to an engine that is up, in its current epoch, and continues exactly what is recorded, with tokens
  of one weight version, within the response's limit and the engine's KV room;
- a call that is lost with its engine is cancelled at once, and nothing is known of it afterwards;
- an `Emit` holds exactly what is recorded, and comes once;
- nobody gives up early or goes on for ever: a request fails after as many failures as allowed, a run ends for want of
  engines only when there is a want.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from seer_async import invariants
from seer_async.core import NO_ENGINE
from seer_async.errors import FailureKind
from seer_async.events import (
    Cancel,
    ChunkFailed,
    ChunkFinished,
    Command,
    Dispatch,
    Emit,
    EngineDown,
    EngineHeld,
    EngineReport,
    EngineUp,
    Event,
    GroupAdded,
    Paused,
    Record,
    Resumed,
    Stop,
)
from seer_async.policies import find_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.config import Config
    from seer_async.core import Core
    from seer_async.types import ChunkReply, EngineInfo, Sample

KEPT = ("stop", "length")
"""Finish reasons of samples that are final; others are tried again when a run is resumed."""


class Account(msgspec.Struct):
    """What is recorded of one request."""

    group: GroupAdded
    tokens: list[int] = []
    logprobs: list[float] = []
    chunks: int = 0
    sent: float = -math.inf  # the latest call
    failures: int = 0  # in a row, by fault of engines
    rejections: int = 0  # in a row
    versions: set[str] = msgspec.field(default_factory=set)
    finish_reason: str | None = None


class Audit:
    """Watches all incarnations of an orchestrator.

    `samples` are those that a run folder would hold. `seen` counts what has happened, so that a test can make sure that
    it tests what it means to.
    """

    def __init__(self, config: Config, groups: Sequence[GroupAdded]) -> None:
        self.samples: dict[str, Sample] = {}
        self.seen: Counter[str] = Counter()
        self.accounts = {f"{g.prompt.id}/{i}": Account(g) for g in groups for i in range(g.n)}
        self._config = config
        self._policy = find_policy(config.scheduler.policy)
        self._sizes: Counter[str] = Counter()  # of groups of a core that lasts

    def start(self, core: Core) -> None:
        """Another orchestrator takes over; it knows the journal and the final samples."""
        self.samples = {key: sample for key, sample in self.samples.items() if sample.finish_reason in KEPT}
        for account in self.accounts.values():
            account.failures = account.rejections = 0  # not in the journal
        self._core = core
        self._up: dict[str, EngineInfo] = {}
        self._epochs: dict[str, int] = {}
        self._busy_until: dict[str, float] = {}
        self._troubled_at: dict[str, float] = dict.fromkeys(core.instances, 0.0)
        self._rejected = False
        self._open: dict[int, Dispatch] = {}
        self._open_on: dict[str, dict[int, Dispatch]] = {name: {} for name in core.instances}
        self._in_flight: set[str] = set()
        self._last_call = 0
        self._answered: tuple[Dispatch, ChunkReply] | None = None
        self._lost: set[int] = set()
        self._blameless: tuple[str, object] | None = None
        self._paused = False
        self._held: set[str] = set()

    # Events, before the core sees them

    def event(self, event: Event, now: float) -> None:
        """Something happens."""
        self._answered = None
        self._blameless = None
        self.seen[type(event).__name__] += 1
        match event:
            case ChunkFinished() | ChunkFailed():
                self._outcome(event, self._closed(event.call), now)
            case EngineUp():
                self._lose(event.engine)
                self._up[event.engine] = event.info
                self._epochs[event.engine] = self._epochs.get(event.engine, 0) + 1
                self._busy_until.pop(event.engine, None)
                self._held.discard(event.engine)
            case EngineDown():
                self._lose(event.engine)
                self._up.pop(event.engine, None)
            case GroupAdded() if self._core.lasting:
                self._added(event)
            case Paused() | Resumed():
                self._paused = isinstance(event, Paused)
            case EngineHeld():
                (self._held.add if event.held else self._held.discard)(event.engine)
            case EngineReport() if event.engine in self._up:
                self.seen["stale EngineReport"] += event.stats.boot != self._up[event.engine].boot
            case _:
                pass

    def _added(self, event: GroupAdded) -> None:
        """A new group, or more of one that is open: ids are not used again."""
        first = self._sizes[event.prompt.id]
        self._sizes[event.prompt.id] += event.n
        self.seen["joined"] += first > 0
        self.accounts |= {f"{event.prompt.id}/{number}": Account(event) for number in range(first, first + event.n)}

    def _outcome(self, event: ChunkFinished | ChunkFailed, dispatch: Dispatch | None, now: float) -> None:
        if dispatch is None:
            self.seen[f"stale {type(event).__name__}"] += 1
        elif isinstance(event, ChunkFinished):
            self._answered = dispatch, event.reply
            self.seen["reply of two versions"] += len(event.reply.versions) > 1
            self.seen["empty reply"] += not event.reply.token_ids
        else:
            self._failed(event, dispatch, now)

    def _failed(self, event: ChunkFailed, dispatch: Dispatch, now: float) -> None:
        self.seen[event.kind] += 1
        account, engine = self.accounts[dispatch.request], dispatch.engine
        self._troubled_at[engine] = now
        if event.kind is FailureKind.BUSY:
            self._busy_until[engine] = max(self._busy_until.get(engine, 0), now + (event.retry_after or 0))
        elif event.kind is FailureKind.REJECTED:
            account.rejections += 1
            self._rejected = True
            self._blameless = engine, self._health(engine)
        else:
            account.failures += 1

    def _health(self, engine: str) -> object:
        instance = self._core.instances[engine]
        return instance.failures, instance.ejections, instance.closed_until, instance.half_open

    def _lose(self, engine: str) -> None:
        self._lost |= self._open_on[engine].keys()

    def _closed(self, call: int) -> Dispatch | None:
        dispatch = self._open.pop(call, None)
        if dispatch is not None:
            del self._open_on[dispatch.engine][call]
            self._in_flight.remove(dispatch.request)
        return dispatch

    # Commands, as they are executed

    def command(self, command: Command, now: float) -> None:
        """The orchestrator did something."""
        self.seen[type(command).__name__] += 1
        match command:
            case Dispatch():
                self._dispatch(command, now)
            case Record():
                self._record(command)
            case Emit():
                self._emit(command.sample, now)
            case Cancel():
                assert self._closed(command.call), f"call {command.call} is cancelled, but not open"
                self._lost.discard(command.call)
            case Stop():
                self._stop(command.reason, now)
            case _:
                pass

    def _record(self, record: Record) -> None:
        account = self.accounts[record.request]
        if record.chunk is None:
            self.accounts[record.request] = Account(account.group, failures=account.failures, sent=account.sent)
            self.seen["restart"] += 1
            return
        assert self._answered, f"{record.request} is recorded without a reply to an open call"
        dispatch, reply = self._answered
        self._answered = None
        assert dispatch.request == record.request, f"{record.request} is recorded with the reply to {dispatch.request}"
        count = len(record.token_ids)
        assert count == len(reply.token_ids) or record.stop_reason in self._config.sampling.stop, "a reply is cut short"
        assert record.token_ids == reply.token_ids[:count], "a record holds other tokens than the reply"
        assert record.logprobs == reply.logprobs[:count], "a record holds other logprobs than the reply"
        chunk = record.chunk
        assert (chunk.n, chunk.tokens) == (account.chunks, count), f"{record.request} misnumbers a chunk"
        assert (chunk.engine, chunk.epoch) == (dispatch.engine, dispatch.epoch), "a chunk has the wrong provenance"
        account.tokens = account.tokens + record.token_ids
        account.logprobs = account.logprobs + record.logprobs
        account.versions = account.versions | {chunk.weight_version}
        account.chunks += 1
        account.failures = account.rejections = 0
        account.finish_reason = record.finish_reason

    def _emit(self, sample: Sample, now: float) -> None:
        account = self.accounts[sample.id]
        assert sample.id not in self.samples, f"{sample.id} is emitted twice"
        assert sample.token_ids == account.tokens, f"{sample.id} is emitted with other tokens than recorded"
        assert sample.logprobs == account.logprobs, f"{sample.id} is emitted with other logprobs than recorded"
        recorded = account.finish_reason or sample.finish_reason
        assert sample.finish_reason == recorded, f"{sample.id} ends otherwise than recorded"
        assert account.finish_reason or sample.finish_reason not in KEPT, f"{sample.id} ends without a record"
        if sample.finish_reason == "error":
            hopeless = account.rejections or account.failures >= self._config.rollout.max_attempts
            despair = sample.error.startswith(NO_ENGINE) and now >= account.sent + self._config.engine.patience_s
            self.seen["despair"] += despair
            self.seen["despair while others run"] += despair and bool(self._open)
            assert hopeless or despair or self._too_long(account), (
                f"{sample.id} is given up after {account.failures} failures"
            )
        self.seen[sample.finish_reason] += 1
        self.samples[sample.id] = sample

    def _too_long(self, account: Account) -> bool:
        left = account.group.limit - len(account.tokens)
        size = self._config.rollout.chunk_size if self._policy.divided else 0
        tokens = len(account.group.prompt.token_ids or []) + len(account.tokens) + min(size or left, left)
        return not any(
            tokens <= min(info.max_model_len, (info.num_blocks - 1) * info.block_size) for info in self._up.values()
        )

    def _dispatch(self, call: Dispatch, now: float) -> None:
        account = self.accounts[call.request]
        assert account.failures < self._config.rollout.max_attempts, f"{call.request} should have been given up"
        assert call.call > self._last_call, f"call {call.call} is not new"
        self._last_call = call.call
        assert call.request not in self._in_flight, f"{call.request} has two open calls"
        assert call.request not in self.samples, f"{call.request} goes on after it was emitted"
        assert account.finish_reason is None, f"{call.request} goes on after its end was recorded"
        assert call.prefix == (account.group.prompt.token_ids or []) + account.tokens, (
            f"{call.request} continues something else than what is recorded"
        )
        assert call.engine in self._up, f"a call is sent to {call.engine}, which is down"
        assert call.engine not in self._held, f"a call is sent to {call.engine}, which is held"
        assert not self._paused, f"{call.request} is sent in a pause"
        account.sent = now
        assert call.epoch == self._epochs[call.engine], f"a call is sent to another epoch of {call.engine}"
        assert now >= self._busy_until.get(call.engine, 0), f"a call is sent to {call.engine}, which asked for a pause"
        if self._config.rollout.mixed_versions == "restart":
            assert account.versions <= {call.weight_version}, f"{call.request} would mix weight versions"
        self._check_length(call, account)
        self._open[call.call] = self._open_on[call.engine][call.call] = call
        self._in_flight.add(call.request)
        if self._policy.admits_by_room:
            self._check_room(call.engine)

    def _check_length(self, call: Dispatch, account: Account) -> None:
        assert call.max_tokens == call.params["max_tokens"] >= 1, f"call {call.call} asks for {call.max_tokens} tokens"
        left = account.group.limit - len(account.tokens)
        assert call.max_tokens <= left, f"{call.request} may get {left} more tokens, not {call.max_tokens}"
        size = self._config.rollout.chunk_size
        assert not size or not self._policy.divided or call.max_tokens <= size, f"call {call.call} is too long a chunk"

    def _check_room(self, engine: str) -> None:
        info, calls = self._up[engine], self._open_on[engine].values()
        share = self._config.engine.kv_fraction if len(calls) > 1 else 1.0  # the first call may have all there is
        room = int((info.num_blocks - 1) * share)
        # Calls relied on to end one after the other may have bounds that do not fit together; what they hold now does.
        grown = 0 if self._config.engine.stagger else 1
        lengths = [len(call.prefix) + grown * call.max_tokens for call in calls]
        need = sum(-(-length // info.block_size) for length in lengths) - self._shared(engine)
        assert need <= room, f"{engine} has {room} KV blocks for us, its calls may need {need}"
        assert len(calls) <= (info.max_num_seqs or len(calls)), f"{engine} runs {len(calls)} calls"

    def _shared(self, engine: str) -> int:
        """Blocks counted more than once: those of a prompt are there once for all calls of its group and version."""
        info = self._up[engine]
        if not info.shares_prefixes:
            return 0
        sharers = Counter(
            (self.accounts[c.request].group.prompt.id, c.weight_version) for c in self._open_on[engine].values()
        )
        prompts = {c.request: self.accounts[c.request].group.prompt for c in self._open_on[engine].values()}
        blocks = {p.id: (len(p.token_ids or ()) - 1) // info.block_size for p in prompts.values()}
        return sum((count - 1) * blocks[group] for (group, _), count in sharers.items())

    def _stop(self, reason: str, now: float) -> None:
        self.seen[f"Stop {reason}"] += 1
        if reason != "no_engine" or self._rejected or len(self._up) < len(self._core.instances):
            return
        pauses = {
            name: max(at + self._config.engine.eject_max_s, self._busy_until.get(name, 0))
            for name, at in self._troubled_at.items()
        }
        assert any(now <= end for end in pauses.values()), "the run gives up although every engine is well"

    # When all commands of an event have been executed

    def settled(self) -> None:
        """Nothing may be owed now, and the core must agree with itself and with what was seen."""
        core = self._core
        assert not self._lost, f"calls {sorted(self._lost)} are lost with their engine and not cancelled"
        assert set(core.calls) == set(self._open), "the core's calls in flight are not those that were sent"
        if self._blameless:
            engine, health = self._blameless
            assert health == self._health(engine), f"{engine} is blamed for a call that it was right to reject"
        for instance in core.instances.values():
            if instance.up and instance.stats is not None and instance.info is not None:
                assert instance.stats.boot == instance.info.boot, f"a foreign reading is taken for {instance.name}"
        invariants.check(core)
