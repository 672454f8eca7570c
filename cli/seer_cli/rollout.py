"""`seer rollout`: sample n responses to every prompt of a dataset, on engines that run or are started here."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
import uvloop

from seer_async.config import Config, Tree, merge, to_toml_tree
from seer_async.dataset import default_dataset, read_dataset
from seer_async.errors import UsageError
from seer_async.fleet import open_fleet
from seer_async.lengths import lengths_for
from seer_async.policies import find_policy, policy_names
from seer_async.rollout import Ending, Rollout
from seer_async.runfolder import RunFolder, require_fresh
from seer_async.types import Prompt
from seer_cli.closing import closing_words
from seer_cli.display import make_display
from seer_cli.engines import local_pool, local_spec, refuse_unused, require_model, require_vllm
from seer_cli.options import config_from, given
from seer_cli.output import machine_errors, print_json
from seer_cli.panel import clean
from seer_cli.process import calm_gc
from seer_cli.toml import toml_lines
from seer_servers.filelimit import raise_file_limit
from seer_servers.fleetfile import fleet_urls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from tokenizers import Tokenizer

    from seer_async.events import Record
    from seer_async.fleet import Fleet
    from seer_async.rollout import Result
    from seer_cli.display import Display

_SAMPLING, _FLEET, _OUTPUT = "Sampling", "Engines", "Run and output"


def rollout(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL with `prompt`, `messages` or `prompt_token_ids` a line; other fields are passed through to "
            "the output. Without it, the prompt set that ships with Seer.",
            show_default=False,
        ),
    ] = None,
    *,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", help="Responses to each prompt: the size of a group. [default: 8]", rich_help_panel=_SAMPLING
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of a response, over all its chunks. [default: 512]", rich_help_panel=_SAMPLING),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. [default: 1.0]", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling. [default: 1.0]", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seeds the run; each sample's own seed derives from it. [default: random]", rich_help_panel=_SAMPLING
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; repeatable.", rich_help_panel=_SAMPLING, show_default=False)
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a chunk, after which a request may move; 0 sends every response whole. [default: 512]",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Scheduling: {', '.join(policy_names())}, or package.module:Class. [default: seer]",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a running vLLM server; repeatable. Without it and --fleet, engines are started here.",
            rich_help_panel=_FLEET,
            show_default=False,
        ),
    ] = None,
    fleet: Annotated[
        str | None,
        typer.Option(
            help="Running engines: a fleet of `seer fleet up` by its name, or a JSON file that lists URLs.",
            rich_help_panel=_FLEET,
            metavar="NAME|FILE",
            show_default=False,
        ),
    ] = None,
    kv_pool: Annotated[
        str | None,
        typer.Option(
            help="What local engines share KV through: shm, mooncake, none, or auto (shm on CPUs). [default: auto]",
            rich_help_panel=_FLEET,
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="How local engines draft: grouped (from the siblings of a response), suffix (vLLM's own; needs "
            "arctic-inference) or ngram (vLLM's own), none, or auto (none). It changes no sample. [default: auto]",
            rich_help_panel=_FLEET,
            show_default=False,
        ),
    ] = None,
    engines: Annotated[
        int | None, typer.Option(help="Local vLLM engines to start. [default: 2]", rich_help_panel=_FLEET)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder for local engines. [default: a small model, fetched once]", rich_help_panel=_FLEET
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder with tokenizer.json, where engines do not give theirs.", rich_help_panel=_FLEET),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first prompts of the dataset.", min=1, rich_help_panel=_OUTPUT)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to create. [default: runs/TIME]", rich_help_panel=_OUTPUT)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the interrupted run in this folder.", rich_help_panel=_OUTPUT)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any config keys.", rich_help_panel=_OUTPUT)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One config key, for example --set engine.kv_fraction=0.9; repeatable.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything that needs no engine, print the resolved config as TOML for --config, and stop.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result (or the error) as one JSON object on stdout.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    display: Annotated[
        str | None,
        typer.Option(help="rich, plain or none. [default: rich on a terminal, else plain]", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Sample n responses to every prompt, in chunks, on a fleet of vLLM servers.

    The output folder holds samples.jsonl (one line a response), run.json, metrics.jsonl, a Perfetto trace and the
    journal from which `--resume` goes on. Ctrl-C once finishes the chunks in flight, twice stops at once; both can be
    resumed.

    Exit codes: 0 all samples done, 2 wrong usage or input, 3 some samples failed, 4 no usable engine, 5 output not
    writable, 130 interrupted and resumable.

    Examples:
    `seer rollout --limit 8 -n 8 --chunk-size 64`

    `seer rollout prompts.jsonl --server http://10.0.0.1:8000 --server http://10.0.0.2:8000 -n 16 --max-tokens 32768`
    """
    options: dict[str, Any] = {
        "rollout.n": n,
        "rollout.chunk_size": chunk_size,
        "sampling.max_tokens": max_tokens,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.seed": seed,
        "sampling.stop": stop,
        "scheduler.policy": policy,
        "fleet.servers": server,
        "fleet.file": fleet,
        "fleet.kv_pool": kv_pool,
        "fleet.draft": draft,
        "fleet.engines": engines,
        "fleet.model": model,
        "fleet.tokenizer": tokenizer,
    }
    with machine_errors(as_json=json):
        _check_display(display)
        if resume:
            given_elsewhere = dataset or out or config or set_ or limit or dry_run
            _check_resume_options(bool(given_elsewhere), options)
            job = _resumed(resume, options, make_display(display or ("none" if json else None)))
        else:
            resolved = config_from(config, set_ or [], options)
            refuse_unused(resolved.fleet, options)
            plan = _planned(resolved, dataset or default_dataset(), limit, out)
            if dry_run:
                plan.show(as_json=json)
                return
            job = _fresh(plan, make_display(display or ("none" if json else None)))
        result = uvloop.run(job)
    if json:
        print_json({"run": result.path, "reason": result.reason, "exit_code": result.exit_code} | result.summary)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A new run, checked as far as that needs no engine."""

    config: Config
    prompts: list[Prompt]
    dataset: str
    out: Path

    def show(self, *, as_json: bool) -> None:
        """What would be run."""
        samples = len(self.prompts) * self.config.rollout.n
        if as_json:
            print_json(
                {
                    "dataset": self.dataset,
                    "groups": len(self.prompts),
                    "samples": samples,
                    "config": to_toml_tree(self.config),
                }
            )
            return
        plan = f"{len(self.prompts)} prompts x {self.config.rollout.n} = {samples} samples"
        typer.echo(f"# {clean(self.dataset)}: {plan} into {clean(str(self.out))}")
        for line in toml_lines(to_toml_tree(self.config)):
            typer.echo(line)


def _planned(config: Config, dataset: Path, limit: int | None, out: Path | None) -> _Plan:
    prompts = read_dataset(dataset, limit)
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    require_fresh(out)
    if not (config.fleet.servers or config.fleet.file):
        require_model(config.fleet.model)
    policy = find_policy(config.scheduler.policy)
    if not lengths_for(config, prompts) and policy.needs_lengths:
        raise UsageError(
            f"policy {policy.name!r} needs --set scheduler.lengths=FILE, a samples.jsonl of an earlier run"
        )
    return _Plan(config=config, prompts=prompts, dataset=str(dataset), out=out)


def _check_display(display: str | None) -> None:
    if display not in {None, "rich", "plain", "none"}:
        raise UsageError("--display must be rich, plain or none")


def _check_resume_options(given_elsewhere: bool, options: Mapping[str, Any]) -> None:  # noqa: FBT001 - one caller
    if given_elsewhere or given(options).keys() - {"fleet"}:
        raise UsageError("--resume takes the run's own prompts and settings; only engine options go with it")


async def _fresh(plan: _Plan, display: Display) -> Ending:
    """A new run from start to end."""
    config = plan.config
    with display:
        async with engine_urls(config, plan.out, display) as urls, open_fleet(config, urls) as fleet:
            tokenizer = await _attached(fleet, display)
            prompts = await fleet.tokenise(plan.prompts, source=plan.dataset)
            folder = RunFolder.create(plan.out, config, prompts, dataset=plan.dataset, command=sys.argv)
            display.phase(f"rolling out {folder.info.samples} samples into {folder.path}")
            return await _roll(Rollout(folder, fleet, tokenizer, watch=display.update), folder, display)


async def _resumed(path: Path, options: Mapping[str, Any], display: Display) -> Ending:
    """An interrupted run, from where its journal ends."""
    folder, records, emitted = RunFolder.resume(path)
    with display:
        if folder.ended:
            folder.close()
            return _nothing_left(folder, display)
        folder.info.config = merge(folder.info.config, _instead(given(options)))
        refuse_unused(folder.config.fleet, options)
        async with engine_urls(folder.config, path, display) as urls, open_fleet(folder.config, urls) as fleet:
            tokenizer = await _attached(fleet, display)
            folder.check_model(fleet.info.model)
            display.phase(f"resuming: {len(emitted)} of {folder.info.samples} samples are there already")
            rollout = Rollout(folder, fleet, tokenizer, watch=display.update)
            return await _roll(rollout, folder, display, records, frozenset(emitted))


def _nothing_left(folder: RunFolder, display: Display) -> Ending:
    assert folder.info.summary is not None
    ending = Ending(reason="done", summary=folder.info.summary, path=str(folder.path))
    display.finish(["nothing is left to do: the run has ended", *closing_words(ending)])
    return ending


def _instead(options: Tree) -> Tree:
    """Engines named now take the place of those the run had, however it named them."""
    fleet = options.get("fleet", {})
    if "file" in fleet and "servers" not in fleet:
        return merge(options, {"fleet": {"servers": []}})
    if fleet.keys() & {"engines", "model"} and "servers" not in fleet:
        return merge({"fleet": {"servers": [], "file": None}}, options)
    return merge(options, {"fleet": {"file": None}}) if "servers" in fleet else options


async def _attached(fleet: Fleet, display: Display) -> Tokenizer:
    await fleet.attach()
    for name, reason in fleet.missing.items():
        display.phase(f"{name} cannot be used yet: {reason}")
    info = fleet.info
    display.phase(f"{len(fleet.attached)} engines serve {info.model}, context {info.max_model_len}")
    return await fleet.tokenizer()


async def _roll(
    rollout: Rollout,
    folder: RunFolder,
    display: Display,
    records: Sequence[Record] = (),
    emitted: frozenset[str] = frozenset(),
) -> Result:
    display.run = folder.info.run
    raise_file_limit()
    calm_gc()
    try:
        with _interrupts(rollout, display):
            result = await rollout.run(records, emitted)
    finally:
        folder.close()
    display.finish(closing_words(result))
    return result


@contextlib.contextmanager
def _interrupts(rollout: Rollout, display: Display) -> Iterator[None]:
    """First Ctrl-C drains, the second aborts; SIGTERM aborts, because whoever sends it will not wait long."""
    loop = asyncio.get_running_loop()
    asked = 0

    def interrupt() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            display.phase("finishing the chunks in flight; Ctrl-C again stops at once")
            rollout.drain()
        else:
            rollout.abort()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, rollout.abort)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


@contextlib.asynccontextmanager
async def engine_urls(config: Config, run_dir: Path, display: Display) -> AsyncIterator[list[str]]:
    """URLs of the configured servers or fleet, or of local engines that live as long as the block."""
    if config.fleet.servers or config.fleet.file:
        yield config.fleet.servers or fleet_urls(str(config.fleet.file))
        return
    require_model(config.fleet.model)
    require_vllm()
    from seer_servers.fleet import LocalFleet  # noqa: PLC0415 - only where engines are started

    spec = local_spec(config.fleet)
    if config.without_drafts:
        spec = msgspec.structs.replace(spec, draft="none")
    pool = local_pool(config.fleet, spec, run_dir)
    async with LocalFleet(spec, config.fleet.engines, run_dir, pool=pool, say=display.phase) as fleet:
        yield fleet.urls
