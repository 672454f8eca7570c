"""What drafting does for an engine: the same requests on engines that differ in how they draft, side by side.

Each contender has an engine, or two. At every point (batch size, temperature) the contenders take turns with the
same groups, prompts and seeds, and only one engine works at a time. Time is the client's; CPU seconds are those of the
engine's processes, which a busy machine disturbs less.

`again` is one more engine that does not draft: how far its ratio is from one is how far engines that are the same
differ, and what a turn of another contender may differ without saying anything.

The last point asks what only a draft server can give: half of each group's responses have been generated on one engine,
and the other half runs on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import statistics
import time
from typing import TYPE_CHECKING

import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from seer_async.engine import EngineClient, engine_session
from seer_async.errors import UsageError
from seer_async.sampling import Sampling, call_params, mix_seed
from seer_async.wire import CallSpec
from seer_servers.fleet import EngineSpec, LocalFleet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import aiohttp

    from seer_async.types import Prompt
    from seer_servers.fleet import LocalEngine

BASELINE = "none"
AGAIN = "again"  # a second engine without drafts
ELSEWHERE = "elsewhere"  # the point whose siblings live on the other engine
_ONE_CORE = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false"}  # as in a fleet of as many engines as cores
_TIMEOUT_S = 900.0
_GOLDEN = (5**0.5 - 1) / 2
_SETTLE_S = 0.6  # counters reach /metrics, and siblings the other engine
_COUNTERS = {  # of a turn, and their metrics: vLLM's own, and our drafter's
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "steps": "seer:draft_steps",
    "steps_off": "seer:draft_steps_off",
}


class Point(msgspec.Struct, frozen=True):
    """Requests at once, and their temperature; `elsewhere` says that earlier siblings ran on the other engine."""

    batch: int
    temperature: float
    elsewhere: bool = False


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One contender's turn at a point."""

    contender: str
    point: Point
    repeat: int
    tokens: int
    seconds: float
    cpu_s: float
    drafted: int
    accepted: int
    drafts: int  # drafts verified, one a request and step
    steps: int  # as a grouped drafter counts them
    steps_off: int  # of which it had switched itself off


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A contender at a point: medians, and medians of each repeat's ratio to the baseline."""

    contender: str
    point: Point
    tokens_per_s: float
    tokens_per_cpu_s: float
    speedup: float
    speedups: tuple[float, float]  # the lowest and the highest of a repeat
    cpu_speedup: float
    tokens_per_draft: float  # mean acceptance length of the drafted steps, bonus token included
    drafted_share: float  # of the tokens that were generated, those that a draft had right
    off_share: float  # of the steps, those in which a grouped drafter had switched itself off


class Engine:
    """One engine of a contender."""

    def __init__(self, local: LocalEngine, client: EngineClient, session: aiohttp.ClientSession) -> None:
        self._local = local
        self._client = client
        self._session = session

    def cpu_s(self) -> float:
        """CPU seconds of the engine's processes since they started; not of a draft server."""
        assert self._local.pid is not None
        total = 0.0
        for process in [(guard := psutil.Process(self._local.pid)), *guard.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    async def counters(self) -> dict[str, int]:
        """Totals of what `_COUNTERS` names."""
        async with self._session.get(f"{self._local.url}/metrics") as reply:
            page = await reply.text()
        totals = dict.fromkeys(_COUNTERS, 0)
        for family in text_string_to_metric_families(page):
            for name, metric in _COUNTERS.items():
                if family.name == metric:
                    totals[name] = int(sum(s.value for s in family.samples if s.name.endswith("_total")))
        return totals

    async def tokens(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids."""
        return await self._client.tokenize(prompt, timeout_s=60)

    async def respond(self, prompt: Prompt, index: int, run: str, sampling: Sampling) -> int:
        """Generate a group's response `index`; returns its length in tokens."""
        info = self._client.info
        assert info is not None
        assert prompt.token_ids is not None
        name = f"{run}-{prompt.id}-{index}"
        params = call_params(
            sampling,
            seed=mix_seed(sampling.seed or 0, int(prompt.id), index),
            prompt_len=len(prompt.token_ids),
            generated=0,
            max_tokens=sampling.max_tokens,
            position_seeds=True,
            kinship={"seer_group": f"{run}/{prompt.id}", "seer_request": str(index), "seer_priority": "low"},
        )
        spec = CallSpec(
            request_id=name,
            model=info.model,
            prefix=prompt.token_ids,
            params=params,
            cache_salt=run,
            max_tokens=sampling.max_tokens,
        )
        return len((await self._client.generate(spec, info, timeout_s=_TIMEOUT_S)).token_ids)


class Contender:
    """A way to draft, and its engines."""

    def __init__(self, name: str, engines: Sequence[Engine]) -> None:
        self.name = name
        self._engines = engines

    async def tokenise(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with their token ids, numbered."""
        ids = [await self._engines[0].tokens(prompt) for prompt in prompts]
        return [
            msgspec.structs.replace(prompt, id=str(number), token_ids=found)
            for number, (prompt, found) in enumerate(zip(prompts, ids, strict=True))
        ]

    async def turn(
        self, point: Point, repeat: int, prompts: Sequence[Prompt], siblings: int, sampling: Sampling
    ) -> Turn:
        """Generate `siblings` responses to each prompt, `point.batch` at once, a group after the other."""
        run = f"{self.name}-{point.batch}-{point.temperature}-{point.elsewhere}-{repeat}"
        work = [(prompt, index) for prompt in prompts for index in range(siblings)]
        engine = self._engines[0]
        if point.elsewhere:
            before = [item for item in work if item[1] < siblings // 2]
            await _run_all(self._engines[1], before, 4 * point.batch, run, sampling)
            work = [item for item in work if item[1] >= siblings // 2]
        await asyncio.sleep(_SETTLE_S)
        counters, cpu, start = await engine.counters(), engine.cpu_s(), time.perf_counter()
        tokens = await _run_all(engine, work, point.batch, run, sampling)
        seconds, used = time.perf_counter() - start, engine.cpu_s() - cpu
        await asyncio.sleep(_SETTLE_S)
        counted = {name: total - counters[name] for name, total in (await engine.counters()).items()}
        return Turn(
            contender=self.name,
            point=point,
            repeat=repeat,
            tokens=tokens,
            seconds=seconds,
            cpu_s=used,
            **counted,
        )


async def _run_all(engine: Engine, work: Sequence[tuple[Prompt, int]], batch: int, run: str, sampling: Sampling) -> int:
    queue = list(reversed(work))
    total = 0

    async def lane() -> None:
        nonlocal total
        while queue:
            prompt, index = queue.pop()
            length = await engine.respond(prompt, index, run, sampling)
            total += length

    await asyncio.gather(*(lane() for _ in range(batch)))
    return total


async def measure_drafts(
    spec: EngineSpec,
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    contenders: Sequence[str],
    points: Sequence[Point],
    siblings: int,
    max_tokens: int,
    repeats: int,
    waves: int,
    groups: int,
    say: Callable[[str], None],
    keep: Callable[[Turn], None],
) -> list[Turn]:
    """Measure contenders on local engines of `spec`, each with its own way to draft.

    A turn is of at least `waves` responses for each request at once, and of at least so many `groups`: how much drafts
    bring differs from prompt to prompt. `keep` is given each turn as it ends.

    Raises:
        FleetError: An engine does not start.
        UsageError: There are too few prompts for a turn.
    """
    turns: list[Turn] = []
    counts = [max(groups, _groups(point, siblings, waves)) for point in points]
    if (most := max(counts)) > len(prompts):
        raise UsageError(
            f"a turn needs {most} prompts and there are {len(prompts)}: use a smaller --batch, --waves or --groups"
        )
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(engine_session())
        each = 1 + any(point.elsewhere for point in points)  # engines of a contender
        specs = [
            msgspec.structs.replace(spec, draft=BASELINE if name == AGAIN else name, extra_env=_ONE_CORE)
            for name in contenders
            for _ in range(each)
        ]
        fleet = await stack.enter_async_context(LocalFleet(specs, len(specs), folder, say=say))
        engines = [await _engine(local, session) for local in fleet.engines]
        lanes = [Contender(name, engines[i * each : (i + 1) * each]) for i, name in enumerate(contenders)]
        # The same for all contenders, and none twice before all had their turn: an engine that remembers would only
        # repeat itself.
        coming = itertools.cycle(spread(await lanes[0].tokenise(prompts)))
        first, sampling = next(coming), Sampling(temperature=points[0].temperature, max_tokens=max_tokens)
        for lane in lanes:  # code and kernels are loaded before anything is timed
            say(f"{lane.name}: a group that is not counted")
            await lane.turn(Point(siblings, points[0].temperature), -1, [first], siblings, sampling)
        for number, (point, count) in enumerate(zip(points, counts, strict=True)):
            for repeat in range(repeats):
                sampling = Sampling(
                    temperature=point.temperature, max_tokens=max_tokens, seed=number * repeats + repeat
                )
                chosen = list(itertools.islice(coming, count))
                for name, lane in _rotated(list(zip(contenders, lanes, strict=True)), repeat):
                    turns.append(await lane.turn(point, repeat, chosen, siblings, sampling))
                    say(_line(turns[-1], name))
                    keep(turns[-1])
    return turns


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in an order of which every part is spread over the dataset, whose neighbours are often alike."""
    count = len(prompts)
    step = next(s for s in itertools.count(max(1, round(_GOLDEN * count))) if math.gcd(s, count) == 1)
    return [prompts[place * step % count] for place in range(count)]


def _groups(point: Point, siblings: int, waves: int) -> int:
    """Enough work that the batch stays full for most of the turn."""
    return max(1, -(-waves * point.batch // siblings)) * (2 if point.elsewhere else 1)


async def _engine(local: LocalEngine, session: aiohttp.ClientSession) -> Engine:
    client = EngineClient(local.url, session)
    await client.attach(timeout_s=60, trial_timeout_s=120)
    return Engine(local, client, session)


def _rotated(items: list[tuple[str, Contender]], by: int) -> list[tuple[str, Contender]]:
    by %= len(items)
    return items[by:] + items[:by]


def _line(turn: Turn, name: str) -> str:
    point = turn.point
    where = ", siblings elsewhere" if point.elsewhere else ""
    return (
        f"batch {point.batch}, T={point.temperature}{where}: {name} {turn.tokens / turn.seconds:.1f} tok/s, "
        f"{turn.tokens / turn.cpu_s:.1f} per CPU second"
    )


def scores(turns: Sequence[Turn]) -> list[Score]:
    """Medians by contender and point; ratios are taken within a repeat."""
    found = []
    for point in dict.fromkeys(turn.point for turn in turns):
        base = {turn.repeat: turn for turn in turns if turn.point == point and turn.contender == BASELINE}
        for name in dict.fromkeys(turn.contender for turn in turns):
            mine = [turn for turn in turns if turn.point == point and turn.contender == name]
            found.append(_score(mine, base))
    return found


def _score(mine: Sequence[Turn], base: dict[int, Turn]) -> Score:
    drafts = sum(turn.drafts for turn in mine)
    accepted = sum(turn.accepted for turn in mine)
    ratios = [(turn, base[turn.repeat]) for turn in mine if turn.repeat in base]
    speedups = [t.tokens / t.seconds * b.seconds / b.tokens for t, b in ratios]
    return Score(
        contender=mine[0].contender,
        point=mine[0].point,
        tokens_per_s=statistics.median(turn.tokens / turn.seconds for turn in mine),
        tokens_per_cpu_s=statistics.median(turn.tokens / turn.cpu_s for turn in mine),
        speedup=_median(speedups),
        speedups=(min(speedups, default=math.nan), max(speedups, default=math.nan)),
        cpu_speedup=_median([t.tokens / t.cpu_s * b.cpu_s / b.tokens for t, b in ratios]),
        tokens_per_draft=1 + accepted / drafts if drafts else 1.0,
        drafted_share=accepted / max(1, sum(turn.tokens for turn in mine)),
        off_share=sum(turn.steps_off for turn in mine) / max(1, sum(turn.steps for turn in mine)),
    )


def score_table(turns: Sequence[Turn]) -> Table:
    """The scores as a table."""
    table = Table(title="Drafting, by batch size and temperature: medians, and medians of ratios to no drafts")
    for heading in (
        "requests at once",
        "T",
        "drafts",
        "tok/s",
        "ratio",
        "of turns",
        "tok/CPU s",
        "ratio",
        "tokens/draft",
        "drafted",
        "steps off",
    ):
        table.add_column(heading, justify="left" if heading == "drafts" else "right")
    for score in scores(turns):
        point = score.point
        table.add_row(
            f"{point.batch}{' (siblings elsewhere)' if point.elsewhere else ''}",
            f"{point.temperature:g}",
            score.contender,
            f"{score.tokens_per_s:.1f}",
            f"{score.speedup:.2f}",
            "{:.2f}-{:.2f}".format(*score.speedups),
            f"{score.tokens_per_cpu_s:.1f}",
            f"{score.cpu_speedup:.2f}",
            f"{score.tokens_per_draft:.2f}",
            f"{score.drafted_share:.0%}",
            f"{score.off_share:.0%}",
        )
    return table


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
