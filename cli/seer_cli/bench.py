"""`seer bench`: figures anyone can measure again.

`bench fleet` runs policies side by side on one live fleet, doing the same work: lengths are forced, runs are
interleaved, medians and ratios are quoted. `bench core` measures what the orchestrator itself costs, over mock engines.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
import typer
import uvloop

from seer_async.config import Config, resolve
from seer_async.dataset import default_dataset, read_dataset
from seer_async.errors import UsageError
from seer_async.fleet import open_fleet
from seer_cli.display import make_display
from seer_cli.draftbench import index, replay
from seer_cli.draftserver import bench_draft_server
from seer_cli.engines import local_spec
from seer_cli.fleetbench import fleet
from seer_cli.kvbench import Figures, measure_pool
from seer_cli.load import measure_core
from seer_cli.options import VllmArgs  # noqa: TC001 - Typer reads annotations
from seer_cli.output import print_json, print_table
from seer_cli.rollout import engine_urls
from seer_cli.servebench import measure_serve
from seer_servers.drafting.kinds import KINDS

if TYPE_CHECKING:
    from seer_cli.specbench import Turn

bench = typer.Typer(help="Measure policies on a live fleet, and the orchestrator itself.", no_args_is_help=True)
bench.command("draft-server")(bench_draft_server)
bench.command("fleet")(fleet)
bench.command("index")(index)
bench.command("replay")(replay)

_WIDTH = 120  # of a table that is not shown on a terminal
_Servers = Annotated[
    list[str] | None,
    typer.Option(
        "--server", help="URL of a running engine; repeatable. Without it, some are started.", show_default=False
    ),
]
_Engines = Annotated[int, typer.Option("--engines", help="Local engines to start.")]


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
            help="Ways to draft; repeatable: none, grouped, suffix (needs arctic-inference), ngram; or again: one more "
            "engine without drafts, to see how far engines that are the same differ. [default: none, grouped, ngram]",
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
    waves: Annotated[
        int, typer.Option(min=1, help="Responses of a turn for each request at once, at least; whole groups are used.")
    ] = 2,
    groups: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts of a turn, at least, from all over the dataset: drafts bring more for one than for another. "
            "A turn of one request at once takes a minute or so for each prompt.",
        ),
    ] = 4,
    dataset: Annotated[
        Path | None, typer.Option(help="Prompts. [default: those that ship with Seer]", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder. [default: a small model, fetched once]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence of the engines.")] = None,
    kv_cache_gib: Annotated[float, typer.Option(min=0.1, help="KV cache of each engine, GiB.")] = 1.0,
    vllm_arg: VllmArgs = None,
    out: Annotated[
        Path | None, typer.Option(help="Add each turn to this JSONL file as it ends.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every turn and score as JSON on stdout.")] = False,
) -> None:
    """Measure drafting: engines that draft in different ways, at the same requests, against one that does not."""
    from seer_cli.specbench import AGAIN, BASELINE, Point, measure_drafts, score_table, scores  # noqa: PLC0415 - heavy

    contenders = list(dict.fromkeys([BASELINE, *(contender or ["grouped", "ngram"])]))
    known = *KINDS, AGAIN
    if unknown := next((name for name in contenders if name not in known), None):
        raise UsageError(f"--contender {unknown}: give one of {', '.join(known)}")
    fleet = {"draft_tokens": draft_tokens, "kv_cache_gib": kv_cache_gib, "model": model, "max_model_len": max_model_len}
    config = resolve({"fleet": fleet | {"vllm_args": vllm_arg or []}})
    points: list[Point] = []
    for t in temperature or [0.6, 1.0]:  # all of one after the other: drafters learn what drafts are worth at it
        points += [Point(b, t) for b in batch or [1, 4, 16, 64]]
        points += [Point(4, t, elsewhere=True)] if elsewhere else []
    prompts = read_dataset(dataset or default_dataset())
    with (
        tempfile.TemporaryDirectory() as scratch,
        make_display("plain") as display,
        out.open("ab") if out else contextlib.nullcontext() as file,
    ):
        turns = uvloop.run(
            measure_drafts(
                local_spec(config.fleet),
                Path(scratch),
                prompts,
                contenders=contenders,
                points=points,
                siblings=siblings,
                max_tokens=max_tokens,
                repeats=repeats,
                waves=waves,
                groups=groups,
                say=display.phase,
                keep=lambda turn: _append(file, turn),
            )
        )
    if json:
        print_json({"turns": msgspec.to_builtins(turns), "scores": msgspec.to_builtins(scores(turns))})
    else:
        print_table(score_table(turns), width=_WIDTH)


def _append(file: BinaryIO | None, turn: Turn) -> None:
    if file:
        file.write(msgspec.json.encode(turn) + b"\n")
        file.flush()


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
