"""`seer fleet`: engines of this machine that stay up between runs, and the commands to run some on other machines."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from seer_async.errors import FleetError, UsageError
from seer_cli.display import make_display
from seer_cli.engines import local_spec, pool_kind, require_model, require_vllm
from seer_cli.fleetstatus import FleetStatus, look, table
from seer_cli.options import VllmArgs, config_from
from seer_cli.output import machine_errors, print_json
from seer_servers.fleetfile import FleetFolder, fleets_folder, is_path, known_fleets, read_fleet_file

if TYPE_CHECKING:
    from seer_async.config import FleetConfig
    from seer_servers.supervisor import Order

fleet = typer.Typer(
    help="Run engines that stay up between runs, for `seer rollout --fleet NAME`; see what they do; stop them.",
    no_args_is_help=True,
)

_Name = Annotated[str, typer.Argument(help="The fleet's name; several fleets can run side by side.")]
_Model = Annotated[
    str | None,
    typer.Option("--model", help="Model folder. [default: a small model, fetched once]", show_default=False),
]
_PoolGib = Annotated[
    float | None, typer.Option("--kv-pool-gib", help="Memory of the KV pool, GiB. [default: 4]", show_default=False)
]
_PoolDiskGib = Annotated[
    float | None,
    typer.Option(
        "--kv-pool-disk-gib",
        help="Disk for blocks that the pool's memory cannot keep, GiB. [default: 0, none]",
        show_default=False,
    ),
]
_KvBlocks = Annotated[
    int | None,
    typer.Option("--kv-blocks", help="KV cache of each engine, in blocks of 32 tokens. [default: what fits]"),
]
_Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Number format. [default: the model's; float32 on CPUs without bfloat16]")
]
_MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Longest prompt plus response. [default: the model's context]")
]
_MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", help="Most requests that run at once in an engine. [default: vLLM's]")
]


def _config(**options: Any) -> FleetConfig:
    return config_from(None, [], {f"fleet.{name}": value for name, value in options.items()}).fleet


@fleet.command("up")
def up(
    name: _Name = "default",
    *,
    engines: Annotated[int | None, typer.Option(help="Engines to start. [default: 2]", show_default=False)] = None,
    model: _Model = None,
    kv_pool: Annotated[
        str | None,
        typer.Option(
            help="What the engines share KV through, so that a request moves without a second prefill: shm, mooncake, "
            "none, or auto (shm on CPUs, none on GPUs). [default: auto]",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="How the engines draft: grouped (from the siblings of a response), suffix (vLLM's own; needs "
            "arctic-inference) or ngram (vLLM's own), none, or auto (none). [default: auto]",
            show_default=False,
        ),
    ] = None,
    kv_pool_gib: _PoolGib = None,
    kv_pool_disk_gib: _PoolDiskGib = None,
    kv_blocks: _KvBlocks = None,
    dtype: _Dtype = None,
    max_model_len: _MaxModelLen = None,
    max_num_seqs: _MaxNumSeqs = None,
    vllm_arg: VllmArgs = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop the fleet on Ctrl-C, instead of leaving it running.")
    ] = False,
) -> None:
    """Start engines on this machine, wait until all are up, print their URLs, and leave them running.

    A supervisor stays with them and starts an engine again that dies. They end with `seer fleet down`, or when the
    supervisor dies, however it dies. Logs and the fleet file are in ~/.local/state/seer/fleets/NAME.

    Exit codes: 0 all engines are up, 2 wrong usage, 4 the fleet runs already or does not start (then nothing of it is
    left running).

    Examples:
    `seer fleet up --engines 2 --model ~/models/qwen --kv-pool shm`, then `seer rollout --fleet default prompts.jsonl`

    `seer fleet up small --engines 1 --kv-blocks 512`
    """
    config = _config(
        engines=engines,
        model=model,
        kv_pool=kv_pool,
        draft=draft,
        kv_pool_gib=kv_pool_gib,
        kv_pool_disk_gib=kv_pool_disk_gib,
        kv_blocks=kv_blocks,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        vllm_args=vllm_arg,
    )
    require_model(config.model)
    require_vllm()
    folder = FleetFolder(name)
    run = _run_here if foreground else _leave_running
    run(folder, config)


def _order(name: str, config: FleetConfig) -> Order:
    from seer_servers.supervisor import Order  # noqa: PLC0415 - only where engines are started

    return Order(
        name=name,
        spec=local_spec(config),
        engines=config.engines,
        kv_pool=pool_kind(config.kv_pool),
        kv_pool_gib=config.kv_pool_gib,
        kv_pool_disk_gib=config.kv_pool_disk_gib,
    )


def _leave_running(folder: FleetFolder, config: FleetConfig) -> None:
    from seer_servers import detached  # noqa: PLC0415 - only where engines are started

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up as after Ctrl-C
    with make_display(None) as display:
        lock = detached.claim(folder)
        detached.start(folder, lock, _order(folder.name, config), display.phase)
        name = folder.name
        display.phase(f"use it: seer rollout --fleet {name}; look: seer fleet status; stop: seer fleet down {name}")
    _print_urls(folder)


def _run_here(folder: FleetFolder, config: FleetConfig) -> None:
    from seer_servers.detached import claim  # noqa: PLC0415 - only where engines are started
    from seer_servers.supervisor import supervise  # noqa: PLC0415 - as above

    display = make_display("plain")
    claim(folder)  # the lock goes with this process
    order = _order(folder.name, config)
    asyncio.run(supervise(folder, order, say=display.phase, ready=lambda: _print_urls(folder)))


def _print_urls(folder: FleetFolder) -> None:
    running = folder.read()
    for url in running.urls if running else ():
        typer.echo(url)


@fleet.command("status")
def status(
    name: Annotated[
        str | None, typer.Argument(help="A fleet's name, or a fleet file. Without it, all fleets of this machine.")
    ] = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object on stdout.")] = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the API key of the engines in a fleet file.", metavar="NAME"),
    ] = None,
) -> None:
    """Show each engine's health, life (epoch), load and KV use, and the KV pool.

    Exit codes: 0 all engines are up, 3 some are, 4 none is or the fleet does not run. Of several fleets the worst.
    """
    with machine_errors(as_json=json):
        key = os.environ.get(api_key_env) if api_key_env else None
        if api_key_env and not key:
            raise UsageError(f"--api-key-env {api_key_env}: that environment variable is not set or empty")
        fleets = asyncio.run(_all([name] if name else known_fleets(), key))
        if not fleets:
            raise FleetError(f"no fleet runs here (none in {fleets_folder()}): start one with `seer fleet up`")
    if json:
        print_json({"fleets": msgspec.to_builtins(fleets)})
    else:
        for each in fleets:
            Console().print(table(each))
    if worst := max(each.exit_code for each in fleets):
        raise typer.Exit(worst)


async def _all(names: list[str], key: str | None) -> list[FleetStatus]:
    return list(await asyncio.gather(*(_one(name, key) for name in names)))


async def _one(name: str, key: str | None) -> FleetStatus:
    if is_path(name):
        return await look(name, read_fleet_file(Path(name)), running=None, api_key=key)
    folder = FleetFolder(name)
    running, said = folder.held, folder.read()
    if said is None:
        how = "is starting or ending" if running else f"does not run: start it with `seer fleet up {name}`"
        raise FleetError(f"fleet {name} {how}")
    return await look(name, said, running=running, api_key=key)


@fleet.command("down")
def down(name: _Name = "default") -> None:
    """Stop a fleet's engines and its supervisor, wait until they are gone, and keep only the logs.

    Also clears away what is left of a fleet whose supervisor was killed. A fleet that does not run is no error.
    """
    from seer_servers.detached import end  # noqa: PLC0415 - only where engines are stopped

    folder = FleetFolder(name)
    with make_display("plain") as display:
        ended = end(folder, display.phase)
    typer.echo(f"fleet {name} is down, its logs are in {folder.logs}" if ended else f"fleet {name} does not run")


@fleet.command("commands")
def commands(
    *,
    model: Annotated[str, typer.Option(help="Model folder or hub name, the same on every machine.")],
    node: Annotated[
        list[str] | None,
        typer.Option(help="HOST or HOST:PORT of an engine; repeatable. [default: NODE-0, NODE-1]", show_default=False),
    ] = None,
    kv_pool: Annotated[str, typer.Option(help="What the engines share KV through: mooncake, shm or none.")] = "none",
    kv_pool_gib: Annotated[float, typer.Option(min=0.01, help="Memory of the KV pool on each machine, GiB.")] = 4.0,
    kv_blocks: _KvBlocks = None,
    dtype: _Dtype = None,
    max_model_len: _MaxModelLen = None,
    max_num_seqs: _MaxNumSeqs = None,
    vllm_arg: VllmArgs = None,
) -> None:
    """Print the commands that run engines on several machines, and the fleet file for `seer rollout --fleet`.

    Seer starts nothing on other machines: run the commands by hand, with srun, or in a Ray task. The output is a shell
    script in parts; a comment says which part belongs where.

    Example: `seer fleet commands --model /models/qwen --node 10.0.0.1 --node 10.0.0.2 --kv-pool mooncake`
    """
    from seer_servers.nodes import parse_node, script  # noqa: PLC0415 - only where engines are started

    config = _config(
        model=model,
        kv_pool=kv_pool,
        kv_pool_gib=kv_pool_gib,
        draft="none",  # a draft server for several machines is started by hand: see design/drafting-server.md
        kv_blocks=kv_blocks,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        vllm_args=vllm_arg,
    )
    nodes = [parse_node(text) for text in node or ["NODE-0", "NODE-1"]]
    typer.echo(script(local_spec(config), nodes, config.kv_pool, config.kv_pool_gib), nl=False)
