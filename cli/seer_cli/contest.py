"""Contenders on live engines: the same responses of the same forced lengths, in turn, round after round.

Each round may have lengths of its own; all contenders of a round have the same.

Engines that draft in different ways are different fleets. All are up from the beginning and one is used at a time, so
contenders can be interleaved.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.config import resolve
from seer_async.errors import FleetError
from seer_async.fleet import open_fleet
from seer_async.policies import find_policy
from seer_async.rollout import Rollout
from seer_async.runfolder import RunFolder
from seer_async.simulation.contender import Contender, parse_contender
from seer_async.types import Prompt
from seer_async.wire import CallSpec
from seer_async.workload import Outcome, judged, outcome
from seer_cli.rollout import engine_urls
from seer_cli.router import require_router, routed, router
from seer_cli.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from seer_async.fleet import Fleet
    from seer_async.types import EngineInfo
    from seer_cli.display import Display

ROUTER = "vllm-router"
NO_DRAFTS = "none"
_SOLO_TOKENS, _SOLO_TURNS = 64, 3
_WARM_CALLS, _WARM_TOKENS = 32, 32
_CALL_S = 600.0
_OVER_ISSUE = 2.0  # `Work.spare`


class Entry(Contender, frozen=True):
    """A contender of ours, or a policy of vllm-router."""

    router: str | None = None

    @property
    def fleet(self) -> str:
        """Its engines, by the way they draft."""
        return self.draft or NO_DRAFTS

    @property
    def stops_early(self) -> bool:
        """Whether it starts more than is needed, and stops."""
        return self.router is None and not find_policy(self.policy).unbiased


def parse_entry(text: str) -> Entry:
    """Read `POLICY[+pool][+grouped|+suffix]` or `vllm-router:POLICY`.

    Raises:
        UsageError: A feature is unknown, or vllm-router is not installed.
        ConfigError: The policy is unknown.
    """
    kind, _, policy = text.partition(":")
    if kind == ROUTER:
        require_router()
        return Entry(text, ROUTER, pool=False, draft=None, router=policy or "power_of_two")
    return Entry(*msgspec.structs.astuple(parse_contender(text)))


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One contender in one round.

    `idle` is by engine: the share of the time in which it ran nothing. `peak_rate` is the most tokens a second that the
    fleet generated in five seconds. `prefilled` are the tokens that prefills computed, but for those of preempted
    requests that came back: they are `recomputed`, None where engines preempted and do not say (without Seer's
    plug-in). `prompts` are the tokens of the prompts that were begun, each once. `accepted` is the mean number of draft
    tokens accepted by a step that had a draft.
    """

    contender: str
    round: int
    outcome: Outcome
    idle: dict[str, float]
    peak_rate: float
    preemptions: int
    migrations: int
    prefilled: int
    recomputed: int | None
    prompts: int
    pooled: int
    accepted: float | None
    failed: int

    @property
    def computed(self) -> int | None:
        """Tokens of all prefills, if known."""
        return None if self.recomputed is None else self.prefilled + self.recomputed

    @property
    def again(self) -> int | None:
        """Tokens that prefills computed a second time: for a sibling, or after a move or a preemption."""
        return None if self.computed is None else max(0, self.computed - self.prompts)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All runs.

    `bounds_s`, by round: seconds that no run without drafts can beat (all work at the fleet's peak rate, or the longest
    alone).
    """

    runs: list[Run]
    solo_step_s: float
    bounds_s: list[float]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What every contender does: `n` responses to each prompt, of the given lengths by request id.

    `spare` are as many prompts again, with lengths too, for a policy that starts twice the work and stops at half of
    it; fewer if there are no more.
    """

    prompts: list[Prompt]
    spare: list[Prompt]
    n: int
    lengths: dict[str, int]

    @property
    def needed(self) -> dict[str, int]:
        """Lengths of what is needed."""
        return {f"{p.id}/{i}": self.lengths[f"{p.id}/{i}"] for p in self.prompts for i in range(self.n)}


class Contest:
    """Contenders, fleets by the way their engines draft, and a folder for what the runs leave."""

    def __init__(self, tree: dict[str, Any], servers: Mapping[str, list[str]], scratch: Path, display: Display) -> None:
        self._tree = tree
        self._servers = servers
        self._scratch = scratch
        self._display = display

    async def run(self, entries: Sequence[Entry], rounds: Sequence[Work]) -> Result:
        """Interleaved: every round begins with another contender."""
        runs: list[Run] = []
        async with self._fleets(entries) as fleets:
            plain = next(iter(fleets.values()))
            solo = await _solo_step(plain)
            for number, untokenised in enumerate(rounds):
                work = await _tokenised(plain, untokenised)
                first = number % len(entries)
                for entry in [*entries[first:], *entries[:first]]:
                    runs.append(await self._one(entry, number, fleets[entry.fleet], work))
                    self._display.phase(told(runs[-1]))
        return Result(runs=runs, solo_step_s=solo, bounds_s=[_bound(runs, entries, work, solo) for work in rounds])

    @contextlib.asynccontextmanager
    async def _fleets(self, entries: Sequence[Entry]) -> AsyncIterator[dict[str, Fleet]]:
        async with contextlib.AsyncExitStack() as stack:
            fleets: dict[str, Fleet] = {}
            for kind in sorted({entry.fleet for entry in entries}, key=lambda kind: kind != NO_DRAFTS):
                config = resolve(self._tree, {"fleet": {"draft": kind, "servers": self._servers.get(kind, [])}})
                folder = self._scratch / f"fleet-{kind}"
                folder.mkdir()
                urls = await stack.enter_async_context(engine_urls(config, folder, self._display))
                fleets[kind] = await stack.enter_async_context(open_fleet(config, urls))
                await fleets[kind].attach()
                await _warm_up(fleets[kind])
            yield fleets

    async def _one(self, entry: Entry, number: int, fleet: Fleet, work: Work) -> Run:
        path = self._scratch / f"{number}-{entry.name.replace(':', '-')}"
        watch = Watch(fleet.clients)
        if entry.router:
            urls = [client.url for client in fleet.clients.values()]
            async with router(urls, entry.router, path.with_suffix(".log")) as url, watch:
                started = time.time()
                ends = await routed(url, fleet.info.model, work)
            judgement = judged([end - started for end in ends], sum(work.needed.values()))
            migrations = failed = 0
            prompts = sum(len(prompt.token_ids or ()) for prompt in work.prompts)
        else:
            started = time.time()
            migrations, failed = await self._roll(entry, path, fleet, work, watch)
            judgement = outcome(path / "samples.jsonl", started)
            prompts = _begun(path / "samples.jsonl")
        verified, accepted = watch.drafted()
        return Run(
            contender=entry.name,
            round=number,
            outcome=judgement,
            idle=watch.idle(started, started + judgement.seconds),
            peak_rate=watch.peak_rate(),
            preemptions=watch.grown("preemptions"),
            migrations=migrations,
            prefilled=watch.grown("prefilled_tokens"),
            recomputed=watch.recomputed(),
            prompts=prompts,
            pooled=watch.grown("pooled_tokens"),
            accepted=accepted / verified if verified else None,
            failed=failed,
        )

    async def _roll(self, entry: Entry, path: Path, fleet: Fleet, work: Work, watch: Watch) -> tuple[int, int]:
        """Sample through our own core; returns moves and failed samples.

        Raises:
            FleetError: The run ended before its work did.
        """
        prompts = work.prompts + work.spare if entry.stops_early else work.prompts
        table = path.with_name(f"{path.name}.lengths.jsonl")
        table.write_bytes(
            b"".join(msgspec.json.encode({"id": i, "length": v}) + b"\n" for i, v in work.lengths.items())
        )
        scheduler = {"policy": entry.policy, "lengths": str(table), "force_lengths": True}
        chosen = {"scheduler": scheduler | {"over_issue": _OVER_ISSUE}, "engine": {"kv_pool": entry.pool}}
        config = resolve(self._tree, chosen)
        folder = RunFolder.create(path, config, prompts, dataset="bench", command=[])
        try:
            async with watch:
                result = await Rollout(folder, fleet, None).run()
        finally:
            folder.close()
        if result.reason != "done":
            raise FleetError(f"{entry.name} did not finish its work ({result.reason}): there is nothing to compare")
        return result.snapshot.migrations, result.snapshot.failed


class _Sample(msgspec.Struct):
    group: str
    prompt_token_ids: list[int]
    chunks: list[msgspec.Raw]


def _begun(samples: Path) -> int:
    """Tokens of the prompts of which anything was sampled, each once."""
    with samples.open("rb") as file:
        written = [msgspec.json.decode(line, type=_Sample) for line in file]
    return sum({sample.group: len(sample.prompt_token_ids) for sample in written if sample.chunks}.values())


def told(run: Run) -> str:
    """A run in one line."""
    o = run.outcome
    idle = ", ".join(f"{share:.0%}" for share in run.idle.values())
    return (
        f"{run.contender}: {o.throughput:.0f} tokens/s, {o.seconds:.1f} s, tail {o.tail_s:.1f} s, idle {idle}, "
        f"{run.preemptions} preemptions, {run.migrations} moves, {count(run.computed)} tokens prefilled "
        f"({count(run.again)} again), {run.pooled} from the pool, {run.failed} failed"
    )


def count(tokens: float | None) -> str:
    """A number of tokens in figures, or a question mark."""
    return "?" if tokens is None else f"{tokens:.0f}"


def _bound(runs: Sequence[Run], entries: Sequence[Entry], work: Work, solo_step_s: float) -> float:
    plain = {entry.name for entry in entries if not entry.draft}
    peak = max((run.peak_rate for run in runs if run.contender in plain), default=0.0)
    alone = max(work.needed.values()) * solo_step_s
    return max(sum(work.needed.values()) / peak, alone) if peak else alone


async def _tokenised(fleet: Fleet, work: Work) -> Work:
    prompts, count = await fleet.tokenise(work.prompts + work.spare), len(work.prompts)
    return msgspec.structs.replace(work, prompts=prompts[:count], spare=prompts[count:])


async def _warm_up(fleet: Fleet) -> None:
    """Let every engine meet a full batch before anything is timed: the first of all contenders would pay for it."""
    await asyncio.gather(
        *(
            fleet.clients[name].generate(_alone(info, f"warm-{number}", _WARM_TOKENS), info, timeout_s=_CALL_S)
            for name, info in fleet.attached.items()
            for number in range(_WARM_CALLS)
        )
    )


async def _solo_step(fleet: Fleet) -> float:
    """Seconds a token takes when an engine has nothing else to do; the median of a few turns."""
    client = fleet.clients[next(iter(fleet.attached))]
    info = fleet.attached[next(iter(fleet.attached))]
    took = []
    for turn in range(_SOLO_TURNS):
        spent = {}
        for tokens in (1, 1 + _SOLO_TOKENS):
            start = time.perf_counter()
            await client.generate(_alone(info, f"{turn}-{tokens}", tokens), info, timeout_s=_CALL_S)
            spent[tokens] = time.perf_counter() - start
        took.append((spent[1 + _SOLO_TOKENS] - spent[1]) / _SOLO_TOKENS)
    return statistics.median(took)


def _alone(info: EngineInfo, name: str, tokens: int) -> CallSpec:
    params = {"max_tokens": tokens, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
    return CallSpec(
        request_id=f"bench-{name}",
        model=info.model,
        prefix=[1, 2, 3],
        params=params | {"extra_args": {"seer_prompt_len": 3}},
        cache_salt=f"bench-{name}",
        max_tokens=tokens,
        vocab_size=info.vocab_size,
        load=False,
        save=False,
    )
