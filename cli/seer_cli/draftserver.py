"""`seer draft-server`, which runs one by hand, and `seer bench draft-server`, which measures one."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from seer_cli.draftload import Figures, Load, measure_server
from seer_cli.output import print_json
from seer_servers.drafting.server import run
from seer_servers.drafting.tokenlog import MAX_TOKENS


def draft_server(
    *,
    address: Annotated[
        str,
        typer.Option(
            help="ipc:///FOLDER/NAME, in a folder that only you reach and that is made if missing, or tcp://HOST:PORT."
        ),
    ],
    max_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens kept, four bytes each; beyond, the least recently used groups are dropped."),
    ] = MAX_TOKENS,
    anywhere: Annotated[
        bool,
        typer.Option("--anywhere", help="Allow a TCP address that other machines reach: they can read and add tokens."),
    ] = False,
) -> None:
    """Run a draft server: engines with SEER_DRAFT_SERVER=ADDRESS share through it what their requests generate.

    Local fleets start one of their own; this is for engines on several machines, or for a server that outlives fleets.
    Prints "draft server ready at ADDRESS" when it listens, and stops on Ctrl-C. It may be killed and started again at
    any time: its clients notice and fill it again.
    """
    run(address, max_tokens=max_tokens, anywhere=anywhere)


def bench_draft_server(
    *,
    groups: Annotated[int, typer.Option(min=1, help="Groups.")] = 64,
    n: Annotated[int, typer.Option("-n", min=1, help="Requests of each group.")] = 16,
    rate: Annotated[float, typer.Option(min=0.1, help="Tokens a second of each request.")] = 100.0,
    clients: Annotated[int, typer.Option(min=1, help="Client processes over which the requests are spread.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long to measure.")] = 15.0,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure the draft server and its clients: CPU, delay from one engine to another, messages."""
    load = Load(groups=groups, requests=n, rate=rate, clients=clients, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure_server(load, Path(folder)))
    if json:
        print_json(msgspec.to_builtins(figures))
    else:
        Console().print(_table(figures))


def _table(figures: Figures) -> Table:
    load = figures.load
    title = f"{load.groups} groups of {load.requests}, {load.rate:g} tokens/s each, {load.clients} clients"
    table = Table("figure", "value", title=title)
    rows = {
        "tokens/s into the server": f"{figures.tokens_per_s:,.0f}",
        "delivered to the others": f"{figures.delivered:.1%}",
        "server CPU, of one core": f"{figures.server_cpu:.1%}",
        "CPU of each client": f"{figures.client_cpu:.1%}",
        "one update() call": f"{figures.update_us:.2f} us",
        "delay, median": f"{figures.delay_p50_ms:.0f} ms",
        "delay, 99th percentile": f"{figures.delay_p99_ms:.0f} ms",
        "requests/s, all clients": f"{figures.messages_per_s:.0f}",
        "KiB/s to the server": f"{figures.bytes_out_per_s / 1024:,.0f}",
        "KiB/s from the server": f"{figures.bytes_in_per_s / 1024:,.0f}",
        "largest message": f"{figures.largest_bytes / 1024:,.0f} KiB",
        "additions dropped": f"{figures.dropped:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
