"""`seer bench`: figures anyone can measure again.

`bench fleet` runs policies side by side on one live fleet, doing the same work: lengths are forced, runs are
interleaved, medians and ratios are quoted. `bench core` measures what the orchestrator itself costs, over mock engines.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from seer_async.config import Config, resolve
from seer_async.dataset import default_dataset, read_dataset
from seer_async.errors import UsageError
from seer_async.policies import find_policy
from seer_async.rollout import Rollout, open_fleet
from seer_async.runfolder import RunFolder
from seer_async.workload import Outcome, heavy_tailed_lengths, outcome
from seer_cli.display import make_display
from seer_cli.draftbench import index, replay
from seer_cli.draftserver import bench_draft_server
from seer_cli.engines import local_spec
from seer_cli.kvbench import Figures, measure_pool
from seer_cli.load import measure_core
from seer_cli.output import print_json
from seer_cli.rollout import engine_urls
from seer_cli.servebench import measure_serve

if TYPE_CHECKING:
    from seer_async.rollout import Fleet
    from seer_async.types import Prompt

bench = typer.Typer(help="Measure policies on a live fleet, and the orchestrator itself.", no_args_is_help=True)
bench.command("draft-server")(bench_draft_server)
bench.command("index")(index)
bench.command("replay")(replay)

_NO_POOL = "-pool"  # after a policy's name

_Servers = Annotated[
    list[str] | None,
    typer.Option(
        "--server", help="URL of a running engine; repeatable. Without it, some are started.", show_default=False
    ),
]
_Engines = Annotated[int, typer.Option("--engines", help="Local engines to start.")]


class _Run(msgspec.Struct, frozen=True, kw_only=True):
    contender: str
    outcome: Outcome
    preemptions: int
    migrations: int
    prefilled: int
    pooled: int
    samples: int
    failed: int


@bench.command("fleet")
def fleet(
    *,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies to compare; repeatable, the first is the baseline. `NAME-pool` leaves the KV pool unused. "
            "[default: group-round-robin, seer-pool, seer]",
        ),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    n: Annotated[int, typer.Option("-n", min=1, help="Responses to each.")] = 8,
    mean: Annotated[float, typer.Option(help="Mean forced length, tokens.")] = 160.0,
    longest: Annotated[int, typer.Option(help="Longest forced length, tokens.")] = 512,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 2,
    kv_blocks: Annotated[
        int, typer.Option(min=0, help="KV blocks of 32 tokens in each local engine: few make KV scarce, 0 is ample.")
    ] = 96,
    kv_pool: Annotated[str, typer.Option(help="KV pool of the local engines: shm, mooncake or none.")] = "shm",
    draft: Annotated[str, typer.Option(help="How the local engines draft: grouped, suffix, ngram or none.")] = "none",
    server: _Servers = None,
    engines: _Engines = 2,
    seed: Annotated[int, typer.Option(help="Seeds the lengths.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print every run as JSON on stdout.")] = False,
) -> None:
    """Compare policies on one live fleet with the same forced lengths, interleaved."""
    pooled = [] if kv_pool == "none" else ["seer-pool"]
    policies = policy or ["group-round-robin", *pooled, "seer"]
    for name in policies:
        find_policy(name.removesuffix(_NO_POOL))
    prompts = read_dataset(default_dataset(), groups)
    if len(prompts) < groups:
        raise UsageError(f"--groups can be at most {len(prompts)}, the prompts that ship with Seer")
    lengths = heavy_tailed_lengths([p.id for p in prompts], n, mean=mean, longest=longest, seed=seed)
    config = {
        "rollout": {"n": n, "chunk_size": chunk_size},
        "sampling": {"max_tokens": longest, "seed": seed},
        "fleet": {
            "servers": server or [],
            "engines": engines,
            "kv_blocks": kv_blocks or None,
            "kv_pool": kv_pool,
            "draft": draft,
        },
        "output": {"trace": False},
    }
    runs = uvloop.run(_compare(config, policies, prompts, lengths, repeats))
    if json:
        print_json({"runs": msgspec.to_builtins(runs)})
    else:
        Console().print(_table(runs, policies))


async def _compare(
    tree: dict[str, Any], policies: list[str], prompts: list[Prompt], lengths: dict[str, int], repeats: int
) -> list[_Run]:
    display = make_display("plain")
    base = resolve(tree)
    runs: list[_Run] = []
    with tempfile.TemporaryDirectory() as scratch, display:
        table = Path(scratch) / "lengths.jsonl"
        table.write_bytes(b"".join(msgspec.json.encode({"id": i, "length": v}) + b"\n" for i, v in lengths.items()))
        async with engine_urls(base, Path(scratch), display) as urls, open_fleet(base, urls) as engines:
            await engines.attach()
            tokenised = await engines.tokenise(prompts)
            for round_ in range(repeats):
                for name in policies[round_ % len(policies) :] + policies[: round_ % len(policies)]:
                    config = resolve(tree, _contender(name, table))
                    runs.append(await _one(name, config, engines, tokenised, Path(scratch) / f"{round_}-{name}"))
                    display.phase(_line(runs[-1]))
    return runs


def _contender(name: str, lengths: Path) -> dict[str, Any]:
    policy = name.removesuffix(_NO_POOL)
    return {
        "scheduler": {"policy": policy, "lengths": str(lengths), "force_lengths": True},
        "engine": {"kv_pool": policy == name},
    }


async def _one(name: str, config: Config, fleet: Fleet, prompts: list[Prompt], path: Path) -> _Run:
    before = [await client.stats(timeout_s=30) for client in fleet.clients.values()]
    folder = RunFolder.create(path, config, prompts, dataset="bench", command=[])
    started = time.time()
    try:
        result = await Rollout(folder, fleet, None).run()
    finally:
        folder.close()
    await asyncio.sleep(1.0)  # let the engines' counters settle
    after = [await client.stats(timeout_s=30) for client in fleet.clients.values()]

    def grown(what: str) -> int:
        return sum(getattr(b, what) - getattr(a, what) for a, b in zip(before, after, strict=True))

    return _Run(
        contender=name,
        outcome=outcome(path / "samples.jsonl", started),
        preemptions=grown("preemptions"),
        prefilled=grown("prefilled_tokens"),
        pooled=grown("pooled_tokens"),
        migrations=result.snapshot.migrations,
        samples=result.snapshot.done,
        failed=result.snapshot.failed,
    )


def _line(run: _Run) -> str:
    o = run.outcome
    return (
        f"{run.contender}: {o.throughput:.0f} tokens/s, {o.seconds:.1f} s, tail {o.tail_s:.1f} s, "
        f"{run.preemptions} preemptions, {run.migrations} migrations, {run.prefilled} tokens prefilled, "
        f"{run.pooled} from the pool, "
        f"{run.samples} samples, {run.failed} failed"
    )


def _table(runs: list[_Run], policies: list[str]) -> Table:
    """Medians over the rounds; ratios to the first policy, round by round."""
    table = Table(
        title=f"medians of {len(runs) // len(policies)} interleaved rounds; ratios to {policies[0]} in brackets"
    )
    for column in ("policy", "tokens/s", "seconds", "tail s", "preemptions", "migrations", "prefilled", "pooled"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    base = [run.outcome for run in runs if run.contender == policies[0]]
    for name in policies:
        mine = [run for run in runs if run.contender == name]
        outcomes = [run.outcome for run in mine]
        speed = statistics.median(a.throughput / b.throughput for a, b in zip(outcomes, base, strict=True))
        tail = statistics.median(a.tail_s / max(b.tail_s, 1e-9) for a, b in zip(outcomes, base, strict=True))
        table.add_row(
            name,
            f"{statistics.median(o.throughput for o in outcomes):.0f} ({speed:.2f})",
            f"{statistics.median(o.seconds for o in outcomes):.1f}",
            f"{statistics.median(o.tail_s for o in outcomes):.1f} ({tail:.2f})",
            f"{statistics.median(run.preemptions for run in mine):.0f}",
            f"{statistics.median(run.migrations for run in mine):.0f}",
            f"{statistics.median(run.prefilled for run in mine):.0f}",
            f"{statistics.median(run.pooled for run in mine):.0f}",
        )
    return table


@bench.command("kv")
def kv(
    *,
    tokens: Annotated[int, typer.Option(min=64, help="Prefix that is resumed elsewhere, tokens.")] = 1900,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of prefill and resume.")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Concurrent requests that move at random.")] = 8,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of each of them.")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="How often those requests are run.")] = 5,
    kv_pool: Annotated[str, typer.Option(help="KV pool of the local engines: shm or mooncake.")] = "shm",
    server: _Servers = None,
    engines: _Engines = 2,
    seed: Annotated[int, typer.Option(help="Seeds prefixes and routes.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure the KV pool: resuming elsewhere against prefilling again, and requests that move at every chunk."""
    fleet = {"servers": server or [], "engines": engines, "kv_pool": kv_pool, "draft": "none", "dtype": "float32"}
    work = {"tokens": tokens, "rounds": rounds, "requests": requests, "chunks": chunks, "repeats": repeats}
    figures = uvloop.run(_measure_pool(resolve({"fleet": fleet}), work | {"seed": seed}))
    if json:
        print_json(msgspec.to_builtins(figures))
    else:
        typer.echo(msgspec.json.format(msgspec.json.encode(figures)).decode())


async def _measure_pool(config: Config, work: dict[str, int]) -> Figures:
    with tempfile.TemporaryDirectory() as scratch, make_display("plain") as display:
        async with engine_urls(config, Path(scratch), display) as urls, open_fleet(config, urls) as engines:
            await engines.attach()
            return await measure_pool(list(engines.clients.values()), **work)


@bench.command("drafts")
def drafts(
    *,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Ways to draft; repeatable: none, grouped, suffix (needs arctic-inference), ngram. [default: none, "
            "grouped, ngram]",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Requests at once; repeatable. [default: 1, 4, 16, 64]")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable. [default: 0.6, 1.0]")] = None,
    elsewhere: Annotated[
        bool, typer.Option(help="Also measure siblings that ran on another engine, at batch 4.")
    ] = True,
    siblings: Annotated[int, typer.Option("-n", min=2, help="Responses to each prompt.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    draft_tokens: Annotated[int, typer.Option(min=1, max=64, help="Longest draft.")] = 8,
    model: Annotated[str | None, typer.Option(help="Model folder. [default: a small model, fetched once]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every turn and score as JSON on stdout.")] = False,
) -> None:
    """Measure drafting: engines that draft in different ways, at the same requests, against one that does not."""
    from seer_cli.specbench import BASELINE, Point, measure_drafts, score_table, scores  # noqa: PLC0415 - heavy

    config = resolve({"fleet": {"model": model, "draft_tokens": draft_tokens, "kv_cache_gib": 1.0}})
    points = [Point(b, t) for t in temperature or [0.6, 1.0] for b in batch or [1, 4, 16, 64]]
    points += [Point(4, t, elsewhere=True) for t in temperature or [0.6, 1.0]] if elsewhere else []
    prompts = read_dataset(default_dataset())
    with tempfile.TemporaryDirectory() as scratch, make_display("plain") as display:
        turns = uvloop.run(
            measure_drafts(
                local_spec(config.fleet),
                Path(scratch),
                prompts,
                contenders=list(dict.fromkeys([BASELINE, *(contender or ["grouped", "ngram"])])),
                points=points,
                siblings=siblings,
                max_tokens=max_tokens,
                repeats=repeats,
                say=display.phase,
            )
        )
    if json:
        print_json({"turns": msgspec.to_builtins(turns), "scores": msgspec.to_builtins(scores(turns))})
    else:
        Console().print(score_table(turns))


@bench.command("core")
def core(
    *,
    in_flight: Annotated[int, typer.Option(min=1, help="Chunks in flight.")] = 10_000,
    pending: Annotated[int, typer.Option(min=0, help="More requests that wait.")] = 10_000,
    engines: Annotated[int, typer.Option(min=1, help="Mock engine processes.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long to measure.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure the orchestrator: CPU per chunk, event-loop lag, and the cost of a decision, over mock engines."""
    figures = uvloop.run(measure_core(in_flight=in_flight, pending=pending, engines=engines, seconds=seconds))
    _show(figures, as_json=json)


@bench.command("serve")
def serve(
    *,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of one request.")] = 512,
    n: Annotated[int, typer.Option("-n", min=1, help="Responses to each.")] = 16,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 64,
    engines: Annotated[int, typer.Option(min=1, help="Mock engine processes.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Single requests, to an engine and to the service in turn.")] = 200,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure `seer serve`: CPU per chunk of a rollout through HTTP, and what it adds to one request."""
    _show(uvloop.run(measure_serve(prompts=prompts, n=n, chunk=chunk_size, engines=engines, turns=turns)), as_json=json)


def _show(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(figures)
        return
    for name, value in figures.items():
        typer.echo(f"{name:40} {value}")
