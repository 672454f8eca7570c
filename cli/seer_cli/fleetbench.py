"""`seer bench fleet`: policies and features side by side on one live fleet."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
import uvloop
from rich.table import Table

from seer_async.config import merge, parse_setting
from seer_async.dataset import default_dataset, read_dataset
from seer_async.errors import UsageError
from seer_async.simulation.contender import rival
from seer_async.simulation.workload import responses
from seer_async.types import Prompt
from seer_async.workload import heavy_tailed_lengths
from seer_cli.contest import NO_DRAFTS, Contest, Entry, Result, Run, Work, count, parse_entry
from seer_cli.display import make_display
from seer_cli.output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DEFAULT = ("group-round-robin", "no-context+pool", "seer", "seer+pool", "oracle+pool")
_ALL = (
    "group-round-robin",
    "vllm-router:power_of_two",
    "vllm-router:consistent_hash",
    "streamrl",
    "no-context",
    "no-context+pool",
    "seer",
    "seer+pool",
    "foresight+pool",
    "oracle+pool",
    "partial+pool",
    "group-round-robin+suffix",
    "seer+pool+suffix",
    "seer+pool+grouped",
)
_COLUMNS = (
    "contender",
    "tokens/s",
    "seconds",
    "tail s",
    "idle",
    "preempted",
    "moves",
    "prefilled",
    "again",
    "pooled",
    "accepted",
    "oracle",
    "bound",
)
_CAPTION = (
    "prefilled: tokens computed by prefills, again: those beyond each prompt once (siblings, moves, preemptions)\n"
    "oracle: throughput as a share of the oracle's, which knows all lengths and is not the best possible\n"
    "bound: the same as a share of what no schedule beats: all work at the fleet's best rate, or the longest alone"
)
_WIDTH = 160  # of a table that is not shown on a terminal


def fleet(
    *,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            "-c",
            help="POLICY[+pool][+grouped|+suffix] (suffix needs arctic-inference), or vllm-router:POLICY (needs that "
            "package) for one call a response; repeatable, ratios are to the first. foresight wants +pool: it leaves "
            "started work for longer work. "
            f"`all` is {len(_ALL)} of them. [default: {', '.join(_DEFAULT)}]",
            show_default=False,
        ),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Prompts.")] = 24,
    n: Annotated[int, typer.Option("-n", min=1, help="Responses to each.")] = 8,
    mean: Annotated[float, typer.Option(help="Mean forced length, tokens.")] = 160.0,
    longest: Annotated[int, typer.Option(help="Longest forced length, tokens.")] = 1024,
    correlation: Annotated[
        float, typer.Option(min=0, max=1, help="How much of the lengths' spread is between groups.")
    ] = 0.9,
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds, each with other lengths.")] = 3,
    kv_blocks: Annotated[
        int, typer.Option(min=0, help="KV blocks in each local engine: few make KV scarce, 0 is ample.")
    ] = 96,
    kv_pool: Annotated[str, typer.Option(help="KV pool of the local engines: shm, mooncake or none.")] = "shm",
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            help="URL of a running engine, or grouped=URL or suffix=URL of one that drafts so; repeatable. Without it, "
            "engines are started.",
            show_default=False,
        ),
    ] = None,
    engines: Annotated[int, typer.Option("--engines", help="Local engines to start, of each kind.")] = 2,
    model: Annotated[
        str | None, typer.Option(help="Model folder of the local engines. [default: a small model, fetched once]")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence of the local engines.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting of all contenders, section.key=value.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds the lengths of the first round; 1 more for each.")] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A recorded run folder: its prompts and the lengths of its responses, instead of --mean, --longest "
            "and --correlation; groups with fewer than -n responses are left out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Save the settings and every run in this JSON file.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every run as JSON on stdout.")] = False,
) -> None:
    """Compare policies, features and vllm-router on one live fleet with the same forced lengths, interleaved.

    A contender's column `oracle` is its throughput as a share of the oracle's (longest first by true lengths: not the
    best possible), `bound` as a share of what no schedule beats: all work at the best rate seen, or the longest alone.
    """
    names = [name for given in contender or _DEFAULT for name in (_ALL if given == "all" else (given,))]
    entries = [parse_entry(name) for name in dict.fromkeys(names)]
    if trace:
        rounds = [_replayed(trace, groups, n)] * repeats
    else:
        rounds = [
            _generated(groups, n, mean=mean, longest=longest, correlation=correlation, seed=seed + number)
            for number in range(repeats)
        ]
    _require_spare(entries, rounds[0])
    tree = {
        "rollout": {"n": n, "chunk_size": chunk_size},
        "sampling": {"max_tokens": max(max(work.lengths.values()) for work in rounds), "seed": seed},
        "fleet": {
            "engines": engines,
            "model": model,
            "max_model_len": max_model_len,
            "kv_blocks": kv_blocks or None,
            "kv_pool": kv_pool,
        },
        "output": {"trace": False},
    }
    tree = merge(tree, *map(parse_setting, set_ or []))
    with tempfile.TemporaryDirectory() as scratch, make_display("plain") as display:
        contest = Contest(tree, _servers(server or [], entries), Path(scratch), display)
        result = uvloop.run(contest.run(entries, rounds))
    record = {"settings": tree, "trace": str(trace) if trace else None} | msgspec.to_builtins(result)
    if out:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    if json:
        print_json(record)
    else:
        print_table(_table(result, entries), width=_WIDTH)


def _generated(groups: int, n: int, *, mean: float, longest: int, correlation: float, seed: int) -> Work:
    prompts = read_dataset(default_dataset())
    if len(prompts) < groups:
        raise UsageError(f"--groups can be at most {len(prompts)}, the prompts that ship with Seer")
    chosen = prompts[: 2 * groups]
    lengths = heavy_tailed_lengths(
        [p.id for p in chosen], n, mean=mean, longest=longest, correlation=correlation, seed=seed
    )
    return Work(prompts=chosen[:groups], spare=chosen[groups:], n=n, lengths=lengths)


def _replayed(path: Path, groups: int, n: int) -> Work:
    """Groups of a recorded run that have enough responses."""
    lengths: dict[str, list[int]] = defaultdict(list)
    prompts: dict[str, Prompt] = {}
    for response in responses(path):
        lengths[response.group].append(len(response.token_ids))
        prompts[response.group] = Prompt(id=response.group, token_ids=response.prompt_token_ids)
    whole = [group for group, row in lengths.items() if len(row) >= n][: 2 * groups]
    if not whole:
        raise UsageError(f"{path} has no group of {n} finished responses: give a smaller -n")
    chosen = [prompts[group] for group in whole]
    forced = {f"{group}/{index}": lengths[group][index] for group in whole for index in range(n)}
    return Work(prompts=chosen[:groups], spare=chosen[groups:], n=n, lengths=forced)


def _require_spare(entries: Sequence[Entry], work: Work) -> None:
    """UsageError if a contender that starts twice the work would run out of it."""
    early = next((entry.name for entry in entries if entry.stops_early), None)
    if early and len(work.spare) < len(work.prompts):
        most = (len(work.prompts) + len(work.spare)) // 2
        raise UsageError(
            f"{early} starts twice as many prompts as it finishes: give --groups {most} at most, or leave it out"
        )


def _servers(given: Sequence[str], entries: Sequence[Entry]) -> dict[str, list[str]]:
    """URLs by the way their engines draft."""
    servers: dict[str, list[str]] = {}
    for text in given:
        kind, equals, url = text.partition("=")
        servers.setdefault(kind if equals else NO_DRAFTS, []).append(url if equals else text)
    wanted = {entry.fleet for entry in entries}
    if given and wanted - servers.keys():
        raise UsageError(f"name running engines that draft {(wanted - servers.keys()).pop()!r} too: --server KIND=URL")
    return servers


def _table(result: Result, entries: Sequence[Entry]) -> Table:
    """Medians over the rounds; ratios are taken round by round."""
    by_name = {entry.name: [run for run in result.runs if run.contender == entry.name] for entry in entries}
    base = by_name[entries[0].name]
    table = Table(
        title=f"medians of {len(base)} interleaved rounds; ratios to {entries[0].name} in brackets", caption=_CAPTION
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for entry in entries:
        oracle = rival(entry, entries)
        oracles = by_name[oracle.name] if oracle else []
        failed = sum(run.failed for run in by_name[entry.name])
        name = f"{entry.name} ({failed} failed)" if failed else entry.name
        table.add_row(name, *_cells(by_name[entry.name], base, oracles, entry, result))
    return table


def _cells(runs: Sequence[Run], base: Sequence[Run], oracles: Sequence[Run], entry: Entry, result: Result) -> list[str]:
    speed = _ratio(runs, base, lambda run: run.outcome.throughput)
    tail = _ratio(runs, base, lambda run: run.outcome.tail_s)
    seconds = _median(runs, lambda run: run.outcome.seconds)
    accepted = [run.accepted for run in runs if run.accepted is not None]
    bounded = not entry.draft and not entry.stops_early
    return [
        f"{_median(runs, lambda run: run.outcome.throughput):.0f} ({speed:.2f})",
        f"{seconds:.1f}",
        f"{_median(runs, lambda run: run.outcome.tail_s):.1f} ({tail:.2f})",
        f"{_median(runs, lambda run: statistics.mean(run.idle.values())):.0%}",
        f"{_median(runs, lambda run: run.preemptions):.0f}",
        f"{_median(runs, lambda run: run.migrations):.0f}",
        _tokens([run.computed for run in runs]),
        _tokens([run.again for run in runs]),
        f"{_median(runs, lambda run: run.pooled):.0f}",
        f"{statistics.median(accepted):.2f}" if accepted else "",
        f"{_ratio(runs, oracles, lambda run: run.outcome.throughput):.0%}" if oracles else "",
        f"{statistics.median(result.bounds_s[run.round] / run.outcome.seconds for run in runs):.0%}" if bounded else "",
    ]


def _tokens(figures: Sequence[int | None]) -> str:
    """Their median, or a question mark if one of them is not known."""
    known = [figure for figure in figures if figure is not None]
    return count(statistics.median(known) if len(known) == len(figures) else None)


def _median(runs: Sequence[Run], figure: Callable[[Run], float]) -> float:
    return statistics.median(map(figure, runs))


def _ratio(runs: Sequence[Run], others: Sequence[Run], figure: Callable[[Run], float]) -> float:
    """The median over the rounds of one's figure divided by the other's."""
    theirs = {run.round: figure(run) for run in others}
    return statistics.median(figure(run) / max(1e-9, theirs[run.round]) for run in runs)
