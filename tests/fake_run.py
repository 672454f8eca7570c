"""A rollout without engines: a real `Core` under a virtual clock, fed with the events of a made-up fleet.

`python -m tests.fake_run --engines 4 --groups 24` shows the live display of one, as fast as asked for.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from typing import TYPE_CHECKING

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.errors import FailureKind
from seer_async.events import (
    Cancel,
    ChunkFailed,
    ChunkFinished,
    Dispatch,
    DrainRequested,
    EngineDown,
    EngineReport,
    EngineUp,
    GroupAdded,
    InputClosed,
    Stop,
    Wake,
    Woke,
)
from seer_async.snapshot import take_snapshot
from seer_async.types import ChunkReply, EngineInfo, EngineStats, Prompt
from seer_async.workload import heavy_tailed_lengths
from seer_cli.display import make_display

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.events import Event
    from seer_async.sink import Tracer
    from seer_async.snapshot import Snapshot

START = 1_790_000_000.0
PROMPT = [7] * 40
LIMIT = 4096


class FakeRun:
    """A run of `groups` x `n` responses on `engines` engines that make `speed` tokens a second for each call.

    One call in `failing` fails; each engine dies once where `dying` is set, and comes back 20 s later.
    """

    def __init__(
        self,
        *,
        engines: int,
        groups: int,
        n: int = 8,
        slots: int = 16,
        blocks: int = 1024,
        chunk: int = 256,
        mean: float = 500,
        speed: float = 60.0,
        failing: int = 150,
        dying: bool = True,
        seed: int = 1,
        group_id: str = "problem-{:04}",
        tracer: Tracer | None = None,
    ) -> None:
        self.names = [f"engine-{i}" for i in range(engines)]
        config = resolve({"rollout": {"n": n, "chunk_size": chunk}, "engine": {"kv_fraction": 0.95}})
        self.core = Core(config, self.names, run="fake", seed=seed)
        self.now = START
        self.stopped: str | None = None
        self._tracer = tracer
        self._speed = speed
        self._failing = failing
        self._rng = random.Random(seed)
        self._agenda: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._info = EngineInfo(
            boot="1", model="m", max_model_len=8192, block_size=16, num_blocks=blocks, max_num_seqs=slots,
            weight_version="step-100",
        )  # fmt: skip
        self._start(groups, n, mean, group_id, dying=dying)

    def _start(self, groups: int, n: int, mean: float, group_id: str, *, dying: bool) -> None:
        ids = [group_id.format(i) for i in range(groups)]
        lengths = heavy_tailed_lengths(ids, n, mean=mean, longest=LIMIT, seed=1)
        for id_ in ids:
            forced = tuple(lengths[f"{id_}/{i}"] for i in range(n))
            self.post(GroupAdded(prompt=Prompt(id=id_, token_ids=PROMPT), n=n, limit=LIMIT, forced_lengths=forced))
        self.post(InputClosed())
        for index, name in enumerate(self.names):
            self.post(EngineUp(engine=name, info=self._info))
            self._later(1.0, EngineReport(engine=name, stats=self._stats(name)))
            if dying and index % 3 == 1:
                self._later(12.0 + 9 * index, EngineDown(engine=name, reason="connection refused by 127.0.0.1:8001"))

    def post(self, event: Event) -> None:
        """Tell the core, and act its commands out."""
        for command in self.core.handle(event, self.now):
            match command:
                case Dispatch():
                    self._dispatch(command)
                case Cancel() if self._tracer:
                    self._tracer.cancelled(command.call, self.now)
                case Wake():
                    self._later(max(0.0, command.at - self.now), Woke())
                case Stop():
                    self.stopped = command.reason

    def snapshots(self, every: float) -> Iterator[Snapshot]:
        """The run until it stops, seen every so many seconds."""
        while self.stopped is None:
            due = self.now + every
            while self._agenda and self._agenda[0][0] <= due and self.stopped is None:
                self.now, _, event = heapq.heappop(self._agenda)
                self._happen(event)
            self.now = max(self.now, due)
            yield take_snapshot(self.core, self.now)

    def _later(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), event))

    def _happen(self, event: Event) -> None:
        match event:
            case ChunkFinished(call=call, reply=reply) if self._tracer and call in self.core.calls:
                self._tracer.finished(
                    call, self.now, tokens=len(reply.token_ids), outcome="ok", finish_reason=reply.finish_reason
                )
            case ChunkFailed(call=call, kind=kind) if self._tracer and call in self.core.calls:
                self._tracer.finished(call, self.now, tokens=0, outcome=str(kind), finish_reason=None)
            case EngineReport(engine=name):
                event = EngineReport(engine=name, stats=self._stats(name))
                self._later(1.0, event)
            case EngineDown(engine=name):
                self._later(20.0, EngineUp(engine=name, info=self._info))
        self.post(event)

    def _dispatch(self, dispatch: Dispatch) -> None:
        if self._tracer:
            self._tracer.dispatched(dispatch, self.now)
        if self._rng.randrange(self._failing) == 0:
            kind = self._rng.choice([FailureKind.SERVER, FailureKind.TIMEOUT, FailureKind.BUSY])
            self._later(0.5, ChunkFailed(call=dispatch.call, kind=kind, message="503 from the engine"))
            return
        tokens = dispatch.max_tokens
        seconds = tokens / self._speed * self._rng.uniform(0.9, 1.3)
        reply = ChunkReply(token_ids=[5] * tokens, logprobs=[-0.5] * tokens, finish_reason="length")
        self._later(seconds, ChunkFinished(call=dispatch.call, reply=reply))

    def _stats(self, name: str) -> EngineStats:
        instance = self.core.instances[name]
        used = 0.8 * instance.reserved / max(1, instance.capacity) if instance.up else 0.0
        return EngineStats(
            boot="1", running=len(instance.in_flight), waiting=0, kv_used=used,
            preemptions=int((self.now - START) / 40) if name.endswith("1") else 0,
            generated_tokens=instance.generated, prompt_tokens=0, cached_tokens=0,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="rich")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--faster", type=float, default=1.0, help="virtual seconds in a real one")
    parser.add_argument("--until", type=float, default=float("inf"), help="drain after so many virtual seconds")
    parser.add_argument("--setup", type=float, default=1.0)
    args = parser.parse_args()
    run = FakeRun(engines=args.engines, groups=args.groups, n=args.n, slots=args.slots)
    display = make_display(args.kind)
    with display:
        display.phase(f"starting {args.engines} engines")
        time.sleep(args.setup)
        display.phase(f"{args.engines} engines serve some/model-8B, context 8192")
        display.phase(f"rolling out {args.groups * args.n} samples into runs/20260101-120000")
        drained = False
        for snapshot in run.snapshots(0.25 * args.faster):
            display.update(snapshot)
            if snapshot.now - START > args.until and not drained:
                drained = True
                display.phase("finishing the chunks in flight; Ctrl-C again stops at once")
                run.post(DrainRequested())
            time.sleep(0.25)
        display.finish(["done, [bold]not markup[/]", "samples in runs/20260101-120000/samples.jsonl"])


if __name__ == "__main__":
    main()
