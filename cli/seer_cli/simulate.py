"""`seer simulate`: policies at the scale of a cluster, under a virtual clock.

The core, the policies and the placement are those of live runs; engines are a cost model, calibrated or a preset.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table

from seer_async.errors import StorageError, UsageError
from seer_async.simulation.calibration import fleet_of_run
from seer_async.simulation.contest import contest, oracle_share
from seer_async.simulation.presets import SETTINGS, setting
from seer_async.simulation.run import Setup
from seer_async.simulation.studies import STUDIES, scaled, study
from seer_async.simulation.workload import recorded
from seer_cli.output import machine_errors, print_json, print_table
from seer_cli.process import calm_gc

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from seer_async.simulation.cost import Fleet
    from seer_async.simulation.outcome import Figures
    from seer_async.simulation.studies import Row

_STUDY_COLUMNS = (
    "workload",
    "contender",
    "throughput",
    "paper",
    "tail time",
    "paper ",
    "total s",
    "tail s",
    "idle",
    "bound",
)
_WIDTH = 130  # of a table that is not shown on a terminal
_CONTENDERS = (
    "group-round-robin",
    "streamrl",
    "no-context+pool",
    "seer",
    "seer+pool",
    "oracle+pool",
    "seer+pool+grouped",
    "oracle+pool+grouped",
    "partial+pool",
)
_CAPTION = (
    "again: tokens computed again after preemptions and moves\n"
    "oracle: throughput as a share of the oracle's, which knows all lengths and is not the best possible\n"
    "bound: the same as a share of what no schedule beats: all work in the best batches, or the longest response alone"
)
_COLUMNS = (
    "contender",
    "tokens/s",
    "ratio",
    "total s",
    "tail s",
    "idle",
    "batch",
    "preempted",
    "again",
    "moves",
    "oracle",
    "bound",
)


_STUDY = {"study_name", "scale", "seed", "json", "out"}  # what may be said of a study
_RECORDED = {"requests", "n", "correlation", "scale"}  # what may not be said of a recorded run


def simulate(
    ctx: typer.Context,
    *,
    workload: Annotated[
        str, typer.Option("--workload", "-w", help=f"{', '.join(SETTINGS)}, or the folder of a recorded run.")
    ] = "cpu",
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            "-c",
            help="POLICY[+pool][+grouped|+suffix]; repeatable, ratios are to the first. foresight wants +pool: it "
            "leaves started work for longer work. [default: nine of them]",
            show_default=False,
        ),
    ] = None,
    study_name: Annotated[
        str | None,
        typer.Option(
            "--study",
            help=f"A measurement of the paper's, again, or one of ours: {', '.join(STUDIES)}.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Engines: a workload's name, or a run folder to calibrate from. [default: the workload's]"),
    ] = None,
    instances: Annotated[int | None, typer.Option(min=1, help="Engines in the fleet.", show_default=False)] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Responses in all.", show_default=False)] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Responses to a prompt.", show_default=False)] = None,
    correlation: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The groups' share of the variance of log lengths.", show_default=False),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=0, help="Tokens of a chunk; 0 sends whole responses.", show_default=False)
    ] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV memory of an engine.", show_default=False)] = None,
    stagger: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="How much admission relies on calls ending one after the other (engine.stagger); 0: not at all.",
            show_default=False,
        ),
    ] = None,
    probes: Annotated[int, typer.Option(min=0, help="Requests of a group that run first.")] = 1,
    estimate: Annotated[str, typer.Option(help="Length estimate of a group: longest, mean or optimistic.")] = "longest",
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of a workload's engines and requests.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds lengths and simultaneous events.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write them to this file.", show_default=False)] = None,
) -> None:
    """Simulate policies on a modelled fleet: the real core and policies, a cost model for engines, a virtual clock.

    A contender's column `oracle` is its throughput as a share of the oracle's (longest first by true lengths: not the
    best possible), `bound` as a share of what no schedule on these engines can beat.
    """
    calm_gc()
    with machine_errors(as_json=json):
        given = _options(ctx)
        if study_name:
            _refuse(given, given.keys() - _STUDY, "a study has its own workloads, engines and contenders")
            rows: list[Row] = []
            for row in study(study_name, seed=seed, scale=scale):
                _told(row.figures)
                rows.append(row)
            table = _study_table(study_name, rows)
            value: dict[str, Any] = {"study": study_name, "rows": msgspec.to_builtins(rows)}
        else:
            if _is_folder(workload):
                _refuse(given, given.keys() & _RECORDED, "a recorded run has its own responses and engines")
            setup = _setup(workload, seed, scale, _given(requests=requests, n=n, correlation=correlation))
            changes = msgspec.structs.asdict(_fleet(engine)) if engine else {}
            changes |= _given(instances=instances, chunk_size=chunk_size)
            changes |= {"scheduler": {"probes": probes}, "admission": _given(stagger=stagger), "estimate": estimate}
            setup = msgspec.structs.replace(setup, **changes)
            if kv_tokens:
                setup = msgspec.structs.replace(
                    setup, engine=msgspec.structs.replace(setup.engine, kv_tokens=kv_tokens)
                )
            figures: list[Figures] = []
            for one in contest(setup, contender or _CONTENDERS):
                _told(one)
                figures.append(one)
            table = _table(setup, figures)
            value = {"figures": [msgspec.to_builtins(f) | {"oracle": oracle_share(f, figures)} for f in figures]}
        if out:
            _save(out, value)
        if json:
            print_json(value)
        else:
            print_table(table, width=_WIDTH)


def _options(ctx: typer.Context) -> dict[str, str]:
    """The options that were given on the command line, by parameter, as one writes them."""
    written = {parameter.name: parameter.opts[0] for parameter in ctx.command.params if parameter.name}
    return {name: text for name, text in written.items() if _source(ctx, name) == "COMMANDLINE"}


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return source.name if source else None


def _refuse(given: dict[str, str], unused: AbstractSet[str], why: str) -> None:
    if unused:
        raise UsageError(f"{why}: leave out {', '.join(text for name, text in given.items() if name in unused)}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _setup(workload: str, seed: int, scale: float, shape: dict[str, Any]) -> Setup:
    """The workload's own setup: a preset's, or a recorded run's with engines calibrated from it."""
    if not _is_folder(workload):
        return scaled(setting(workload), seed=seed, scale=scale, changes=shape)
    return Setup(workload=recorded(Path(workload)), seed=seed, **msgspec.structs.asdict(fleet_of_run(Path(workload))))


def _fleet(name: str) -> Fleet:
    return fleet_of_run(Path(name)) if _is_folder(name) else setting(name).fleet


def _is_folder(name: str) -> bool:
    return "/" in name or Path(name).is_dir()


def _told(figures: Figures) -> None:
    """Say on stderr what is known so far: a large simulation takes minutes."""
    typer.echo(
        f"{figures.workload} {figures.contender}: {figures.throughput:.0f} tokens/s, {figures.total_s:.0f} s, "
        f"tail {figures.tail_s:.0f} s (simulated in {figures.wall_s:.1f} s)",
        err=True,
    )
    if figures.failed:
        typer.echo(_failed(figures), err=True)


def _save(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def _table(setup: Setup, figures: list[Figures]) -> Table:
    work = setup.workload
    table = Table(
        title=f"{work.name}: {work.requests} responses of {work.tokens / work.requests:.0f} tokens on average, "
        f"{setup.instances} engines of {setup.engine.kv_tokens} tokens, chunks of {setup.chunk_size}",
        caption="".join(f"{_failed(f)}\n" for f in figures if f.failed) + _CAPTION,
    )
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for f in figures:
        share = oracle_share(f, figures)
        table.add_row(
            f.contender,
            f"{f.throughput:.0f}",
            f"{f.throughput / figures[0].throughput:.2f}" if figures[0].throughput else "",
            f"{f.total_s:.0f}",
            f"{f.tail_s:.0f}",
            f"{f.idle:.0%}",
            f"{f.batch:.0f}",
            f"{f.preemptions}",
            f"{f.again}",
            f"{f.migrations}",
            "" if share is None else f"{share:.0%}",
            f"{f.bound:.0%}",
        )
    return table


def _failed(f: Figures) -> str:
    return f"{f.contender}: {f.failed} of {f.requests + f.failed} responses did not finish: no engine's KV holds them"


def _study_table(name: str, rows: list[Row]) -> Table:
    table = Table(title=f"study {name}: throughput and tail time relative to each workload's first contender")
    for column in _STUDY_COLUMNS:
        table.add_column(column, justify="left" if column in {"workload", "contender"} else "right")
    for row in rows:
        f = row.figures
        table.add_row(
            f.workload,
            f.contender,
            f"{row.speed:.2f}",
            "" if row.paper_speed is None else f"{row.paper_speed:.2f}",
            f"{row.tail:.2f}",
            "" if row.paper_tail is None else f"{row.paper_tail:.2f}",
            f"{f.total_s:.0f}",
            f"{f.tail_s:.0f}",
            f"{f.idle:.0%}",
            f"{f.bound:.0%}",
        )
    return table
