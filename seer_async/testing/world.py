"""A whole rollout in one process and in virtual time: the real core, simulated engines, and faults.

Invariants: commands are executed in order, as the asyncio shell does; the audit sees every event and every executed
command; the same seed gives the same events and commands, which `trace` digests.

    clock = VirtualClock(seed)
    world = World(config, groups, engines, clock, seed=seed, faults=faults)
    world.finish()
    world.samples["group/0"]

An orchestrator may die between any two commands. `finish` then starts another one on the same journal, and goes on
until every response is a sample for good.
"""

from __future__ import annotations

import random
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar

import msgspec

from seer_async.core import Core
from seer_async.events import (
    AbortRequested,
    Cancel,
    Command,
    Dispatch,
    DrainRequested,
    Emit,
    Event,
    GroupAdded,
    HandBack,
    InputClosed,
    Record,
    Restored,
    Stop,
    Wake,
    Woke,
)
from seer_async.testing.audit import KEPT, Audit
from seer_async.testing.faults import Fault, FaultKind, Faults
from seer_async.testing.link import Link

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from seer_async.config import Config
    from seer_async.testing.clock import Timer, VirtualClock
    from seer_async.testing.engine import SimulatedEngine
    from seer_async.types import Sample

CRASHED = "crashed"
"""Why an orchestrator ended when it did not stop by itself."""

_MOST_EVENTS = 500_000  # more is a livelock
_MOST_LIVES = 100
_STALL_S = 60.0  # beyond all that an orchestrator may rightly wait for
_DOWNTIME_S = 1.0


class World:
    """One run. `lengths` are true lengths, for policies that need them; `tokenizer` decides text and stop strings.

    Every command is audited. The checks after each event cost time in proportion to the number of requests; without
    `check` they are left out, for simulations of large fleets.
    """

    lasting: ClassVar[bool] = False

    def __init__(
        self,
        config: Config,
        groups: Sequence[GroupAdded],
        engines: Sequence[SimulatedEngine],
        clock: VirtualClock,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        lengths: Mapping[str, int] | None = None,
        tokenizer: Tokenizer | None = None,
        check: bool = True,
    ) -> None:
        self.clock = clock
        self.engines = {engine.name: engine for engine in engines}
        self.audit = Audit(config, groups)
        self.journal: list[Record] = []
        self.lives = 0
        self.events = 0
        self.versions = {engine.version for engine in engines}
        self.core: Core
        self._config = config
        self._groups = groups
        self._seed = seed
        self._faults = faults or Faults()
        self._lengths = lengths
        self._tokenizer = tokenizer
        self._check = check
        self._rng = random.Random(f"world {seed}")  # noqa: S311 - a simulation must repeat itself
        self._trace = blake2b(digest_size=16)
        self._encoder = msgspec.json.Encoder(order="deterministic")
        self._links: dict[str, Link] = {}
        self._alarm: Timer | None = None
        self._ended: str | None = None
        self._dies_at: int | None = None  # the event at which the orchestrator dies
        self._calm = False
        self._moved_at = 0.0
        for engine in engines:
            engine.start()
        self._timed = [clock.after(fault.at, partial(self._befall, fault)) for fault in self._faults.timed]

    @property
    def samples(self) -> dict[str, Sample]:
        """What has been emitted, by request id."""
        return self.audit.samples

    @property
    def trace(self) -> str:
        """Digest of all events and commands so far."""
        return self._trace.hexdigest()

    # Orchestrators

    def finish(self) -> None:
        """Run, and resume whatever ended early, until every response is a sample for good."""
        reason = self.run()
        while reason != "done" or not self._complete():
            assert self.lives < _MOST_LIVES, "the run is resumed again and again, and never ends"
            assert reason == "done" or not self._calm, f"the run ends with {reason!r} in peace"
            if reason == "done":  # with samples that failed: they are tried again in peace
                self.calm()
            self._sleep(_DOWNTIME_S)
            reason = self.run()

    def run(self) -> str:
        """One orchestrator, from its start to its end; returns its reason, or `CRASHED`."""
        self._start()
        wait = 2 * self._config.engine.chunk_timeout_s + self._config.engine.patience_s + _STALL_S
        while self._ended is None:
            assert self.clock.step(), "nothing is due any more, and the run has not ended"
            assert self.events < _MOST_EVENTS, "the run is a livelock"
            assert self.clock.now < self._moved_at + wait, f"nothing was sent or recorded for {wait} s"
        for link in self._links.values():
            link.close()
        if self._alarm:
            self._alarm.cancel()
        return self._ended

    def _start(self) -> None:
        """Begin a life: groups, then what the journal holds, then the end of input, then engines."""
        self.lives += 1
        self._ended = None
        self._moved_at = self.clock.now
        emitted = {key for key, sample in self.samples.items() if sample.finish_reason in KEPT}
        self.core = Core(
            self._config,
            list(self.engines),
            run="world",
            seed=self._seed,
            tokenizer=self._tokenizer,
            lengths=self._lengths,
            lasting=self.lasting,
        )
        self.audit.start(self.core)
        self._links = {engine.name: self._link(engine) for engine in self.engines.values()}
        self._give_work(emitted)
        for link in self._links.values():
            self.clock.after(self._rng.uniform(0, 0.1), link.watch)

    def _give_work(self, emitted: set[str]) -> None:
        for group in self._groups:
            self.post(group)
        for record in list(self.journal):
            self.post(Restored(record=record, emitted=record.request in emitted))
        self.post(InputClosed())

    def _link(self, engine: SimulatedEngine) -> Link:
        rng = random.Random(f"link {self._seed} {self.lives} {engine.name}")  # noqa: S311 - a simulation must repeat itself
        return Link(
            engine,
            self.post,
            incarnation=self.lives,
            config=self._config.engine,
            clock=self.clock,
            faults=self._faults,
            rng=rng,
        )

    def _complete(self) -> bool:
        again = {"error"} if not self.core.policy.unbiased else {"error", "unfinished"}
        return self.samples.keys() == self.audit.accounts.keys() and not any(
            sample.finish_reason in again for sample in self.samples.values()
        )

    def _sleep(self, seconds: float) -> None:
        awake: list[bool] = []
        self.clock.after(seconds, lambda: awake.append(True))
        while not awake:
            self.clock.step()

    # Events and commands

    def post(self, event: Event) -> None:
        """Tell the orchestrator, and do what it says."""
        if self._ended is not None:
            return
        self.events += 1
        self._note(event)
        self.audit.event(event, self.clock.now)
        commands = self.core.handle(event, self.clock.now)
        if self.events == self._dies_at:
            self._dies_at = None
            self._ended = CRASHED
            commands = commands[: self._rng.randint(0, len(commands))]
        for command in commands:
            self._note(command)
            self.audit.command(command, self.clock.now)
            self._execute(command)
        if self._check and self._ended != CRASHED:
            self.audit.settled()

    def _note(self, item: Event | Command) -> None:
        self._trace.update(self._encoder.encode((self.clock.now, type(item).__name__, item)))

    def _execute(self, command: Command) -> None:
        match command:
            case Dispatch():
                self._moved_at = self.clock.now
                self._links[command.engine].send(command)
            case Record():
                self._moved_at = self.clock.now
                self.journal.append(command)
            case Cancel():
                self._links[command.engine].cancel(command.call)
            case HandBack():
                for call in command.calls:
                    self._links[command.engine].hand_back(call)
            case Wake():
                self._wake_at(command.at)
            case Stop():
                self._ended = command.reason
            case Emit():
                pass  # the audit keeps the sample

    def _wake_at(self, at: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = self.clock.after(at - self.clock.now, lambda: self.post(Woke()))

    # Faults

    def crash(self, events: int = 1) -> None:
        """Let the orchestrator die at the `events`-th event from now, after some of the commands."""
        self._dies_at = self.events + events

    def calm(self) -> None:
        """End all faults, and let no more happen."""
        self._calm = True
        self._dies_at = None
        self._faults.calm()
        for timer in self._timed:
            timer.cancel()
        for engine in self.engines.values():
            engine.partitioned = engine.lying = False
            engine.slow_down(1.0)
            self._revive(engine)

    def _befall(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.WEIGHTS:
                self._update_weights(fault.seconds)
            case FaultKind.CRASH:
                self.crash()
            case FaultKind.DRAIN:
                self.post(DrainRequested())
            case FaultKind.ABORT:
                self.post(AbortRequested())
            case _:
                self._afflict(self.engines[fault.engine or ""], fault)

    def _afflict(self, engine: SimulatedEngine, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.KILL:
                engine.kill()
                self.clock.after(fault.seconds, lambda: self._revive(engine))
            case FaultKind.SLOW:
                engine.slow_down(fault.factor)
                self.clock.after(fault.seconds, lambda: engine.slow_down(1.0))
            case FaultKind.PARTITION:
                engine.partitioned = True
                self.clock.after(fault.seconds, lambda: setattr(engine, "partitioned", False))
            case FaultKind.LIE:
                engine.lying = True
                self.clock.after(fault.seconds, lambda: setattr(engine, "lying", False))
            case _:
                raise AssertionError(f"{fault.kind} does not befall an engine")

    def _revive(self, engine: SimulatedEngine) -> None:
        if not engine.alive:
            engine.start()

    def _update_weights(self, within: float) -> None:
        version = f"v{len(self.versions)}"
        self.versions.add(version)
        for engine in self.engines.values():
            self.clock.after(self._rng.uniform(0, within), partial(engine.update_weights, version))
