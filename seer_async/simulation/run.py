"""A rollout under a virtual clock: the real core, policy and placement over engines with closed-form progress.

The core is the one that runs live fleets. It counts tokens in grains: one token of the core's stands for `grain` of the
engines', so that a response of 65,536 tokens is a list of 1,024 entries; lengths are rounded up to whole grains.
Invariants: commands are executed in order; calls of one engine that end together are one batch of events; the same
arguments give the same figures.

Left out: the network, faults, and telemetry (nothing else uses these engines, and a policy that admits by room causes
no preemption).
"""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.events import ChunkFinished, Dispatch, Emit, EngineUp, Event, GroupAdded, InputClosed, Wake, Woke
from seer_async.simulation.acceptance import Drafting
from seer_async.simulation.cost import EngineModel
from seer_async.simulation.engine import Call, FastEngine
from seer_async.simulation.estimates import find_estimate
from seer_async.simulation.outcome import Figures, lower_bound
from seer_async.simulation.workload import Workload
from seer_async.testing.clock import VirtualClock
from seer_async.types import ChunkReply, EngineInfo, Prompt
from seer_async.workload import tail_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.events import Command
    from seer_async.simulation.contender import Contender

_BLOCK = 16  # tokens, unless a grain is more
_GRAINS = 64  # in a chunk, at least
_POOL = "simulated"


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What all contenders share. `chunk_size` in tokens, 0 for whole responses; `grain` 0 chooses one.

    `scheduler` are keys of the config's scheduler section; `estimate` names a rule of `simulation.estimates`.
    """

    workload: Workload
    engine: EngineModel
    instances: int
    chunk_size: int
    scheduler: dict[str, Any] = {}
    estimate: str = "longest"
    seed: int = 0
    grain: int = 0


class Simulation:
    """One contender in one setup."""

    def __init__(self, setup: Setup, contender: Contender) -> None:
        self.workload = setup.workload
        self.contender = contender
        self.grain = setup.grain or max(1, setup.chunk_size // _GRAINS)
        self.clock = VirtualClock(setup.seed)
        self.drafting = Drafting.from_table(grouped=contender.draft == "grouped") if contender.draft else None
        self.finished: dict[str, float] = {}  # when responses finished
        self.tokens = self.chunks = self.loaded = 0
        self._model = setup.engine
        self._started: Counter[str] = Counter()  # requests by group
        self._pool: dict[str, int] = {}  # tokens by request
        self._replies: dict[int, ChunkReply] = {}
        self._true = self._lengths()
        self.engines = {name: self._engine(name) for name in (f"e{number}" for number in range(setup.instances))}
        self.core = self._core(setup)

    def _core(self, setup: Setup) -> Core:
        chunk = max(1, setup.chunk_size // self.grain) if setup.chunk_size else 0
        config = resolve(
            {
                "rollout": {"chunk_size": chunk},
                "scheduler": {**setup.scheduler, "policy": self.contender.policy},
                "engine": {"max_in_flight": 10**6},  # an engine's own limit holds
            }
        )
        estimate = find_estimate(setup.estimate)
        return Core(config, list(self.engines), run="simulation", seed=setup.seed, lengths=self._true, context=estimate)

    def run(self) -> Figures:
        """Simulate it from the first call to the last sample."""
        begun = time.process_time()
        self._post([*self._groups(), InputClosed()])
        self._post([EngineUp(engine=name, info=self._info(name)) for name in self.engines])
        while self.core.stopped is None:
            assert self.clock.step(), "nothing is due any more, and the rollout has not ended"
        return self._figures(time.process_time() - begun)

    # What the core is told

    def _grains(self, tokens: int) -> int:
        return -(-tokens // self.grain)

    def _lengths(self) -> dict[str, int]:
        return {
            f"{group.id}/{index}": self._grains(length)
            for group in self.workload.groups
            for index, length in enumerate(group.lengths)
        }

    def _groups(self) -> list[Event]:
        limit = self._grains(self.workload.limit)
        return [
            GroupAdded(
                prompt=Prompt(id=group.id, token_ids=[0] * self._grains(group.prompt)),
                n=len(group.lengths),
                limit=limit,
                forced_lengths=tuple(self._grains(length) for length in group.lengths),
            )
            for group in self.workload.groups
        ]

    def _info(self, name: str) -> EngineInfo:
        block = max(1, _BLOCK // self.grain)
        return EngineInfo(
            boot=name,
            model="simulated",
            max_model_len=self._model.kv_tokens // self.grain,
            block_size=block,
            num_blocks=self._model.kv_tokens // self.grain // block + 1,
            max_num_seqs=self._model.max_seqs,
            shares_prefixes=True,
            kv_pool=_POOL if self.contender.pool else None,
        )

    def _reply(self, call: Call) -> ChunkReply:
        grains = call.amount // self.grain
        if call.cached or call.pooled or grains not in self._replies:
            reply = ChunkReply(
                token_ids=[0] * grains,
                logprobs=[0.0] * grains,
                finish_reason="length",
                cached=call.cached // self.grain,
                pooled=call.pooled // self.grain,
            )
            return reply if call.cached or call.pooled else self._replies.setdefault(grains, reply)
        return self._replies[grains]

    # Events and commands

    def _post(self, events: Sequence[Event]) -> None:
        called: dict[str, None] = {}
        for command in self.core.handle_all(events, self.clock.now):
            self._execute(command, called)
        for name in called:
            self.engines[name].plan()

    def _execute(self, command: Command, called: dict[str, None]) -> None:
        match command:
            case Dispatch():
                self._send(command, called)
            case Emit():
                self._emitted(command)
            case Wake():
                self.clock.after(command.at - self.clock.now, lambda: self._post([Woke()]))
            case _:
                pass  # nothing is journalled; calls are given up only when the rollout ends, and `run` sees that

    def _emitted(self, emit: Emit) -> None:
        if emit.sample.finish_reason in {"stop", "length"}:
            self.finished[emit.sample.id] = self.clock.now
            self.tokens += self._true[emit.sample.id] * self.grain

    def _send(self, dispatch: Dispatch, called: dict[str, None]) -> None:
        group, _, _ = dispatch.request.rpartition("/")
        call = Call(
            dispatch.call,
            dispatch.request,
            group,
            prompt=dispatch.params["extra_args"]["seer_prompt_len"] * self.grain,
            prefix=len(dispatch.prefix) * self.grain,
            amount=dispatch.max_tokens * self.grain,
        )
        if dispatch.n == 0:
            self._started[group] += 1
        self.chunks += 1
        engine = self.engines[dispatch.engine]
        missing = self._pool.get(dispatch.request, 0) - engine.holds(call)
        if missing > 0:
            call.pooled = missing
            self.loaded += missing
            self.clock.after(missing * self._model.cost.load_token_s, partial(self._arrive, engine, call))
        else:
            engine.submit(call)
            called[engine.name] = None

    def _arrive(self, engine: FastEngine, call: Call) -> None:
        engine.submit(call)
        engine.plan()

    def _answer(self, calls: list[Call]) -> None:
        if self.contender.pool:
            self._pool.update((call.request, call.prefix + call.amount) for call in calls)
        self._post([ChunkFinished(call=call.id, reply=self._reply(call)) for call in calls])

    def _engine(self, name: str) -> FastEngine:
        block = max(self.grain, _BLOCK)
        return FastEngine(
            name,
            self._model,
            self.clock,
            self._answer,
            shared_prompt=lambda prompt: (prompt - self.grain) // block * block,
            drafting=self.drafting,
            references=lambda call: self._started[call.group] - 1,
        )

    # What came of it

    def _figures(self, wall_s: float) -> Figures:
        total = self.clock.now
        engines = self.engines.values()
        lengths = [self._true[request] * self.grain for request in self.finished]
        bound = lower_bound(lengths, len(engines), self._model, self.drafting)
        return Figures(
            contender=self.contender.name,
            workload=self.workload.name,
            throughput=self.tokens / total,
            total_s=total,
            tail_s=total - tail_start(self.finished.values()),
            idle=1 - sum(engine.busy_s for engine in engines) / (total * len(engines)),
            batch=sum(engine.generated for engine in engines) / max(1.0, sum(engine.steps for engine in engines)),
            preemptions=sum(engine.preemptions for engine in engines),
            migrations=self.core.responses.migrations,
            again=sum(engine.again for engine in engines),
            loaded=self.loaded,
            requests=len(self.finished),
            tokens=self.tokens,
            chunks=self.chunks,
            bound=bound / total,
            wall_s=wall_s,
        )
