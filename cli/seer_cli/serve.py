"""`seer serve`: a fleet behind one address that looks like one vLLM server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvloop

from seer_cli.display import make_display
from seer_cli.engines import refuse_unused
from seer_cli.options import config_from
from seer_cli.process import calm_gc
from seer_cli.rollout import engine_urls
from seer_servers.filelimit import raise_file_limit
from seer_servers.listening import require_free
from seer_servers.service.keys import Keys
from seer_servers.service.serve import serve as serve_fleet

if TYPE_CHECKING:
    from seer_async.config import Config

_SERVING, _FLEET, _OTHER = "Serving", "Engines", "Configuration"


def serve(
    *,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; other than loopback only with API keys. [default: 127.0.0.1]",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one. [default: 8100]", rich_help_panel=_SERVING)
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the API keys clients must send, several with commas between.",
            rich_help_panel=_SERVING,
            metavar="NAME",
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a chunk, after which a request may move; 0 sends every response whole. [default: 512]",
            rich_help_panel=_SERVING,
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
    engines: Annotated[
        int | None, typer.Option(help="Local vLLM engines to start. [default: 2]", rich_help_panel=_FLEET)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder for local engines. [default: a small model, fetched once]", rich_help_panel=_FLEET
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
            help="How local engines draft: grouped, suffix, ngram, none, or auto (none). [default: auto]",
            rich_help_panel=_FLEET,
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any config keys.", rich_help_panel=_OTHER)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="One config key, for example --set serve.stream_chunk_size=16; repeatable.",
            rich_help_panel=_OTHER,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a fleet of vLLM servers at one address, as if it were one vLLM server.

    Completions, chat and token-in-token-out requests go through the same core as a rollout: cut into chunks, scheduled
    by group, moved between engines. Trainers and OpenAI clients need no change. A group is the n of one request,
    requests with equal prompts that come while one of them is open, or requests with the same X-Seer-Group header.
    GET /openapi.json describes every route.

    Engines of your own must run with --enable-scale-out. The line "seer serve ready at URL" says when it listens.
    Ctrl-C once finishes what is open, twice stops at once.

    Examples:
    `seer serve --engines 2`

    `seer serve --server http://10.0.0.1:8000 --server http://10.0.0.2:8000 --host 10.0.0.9 --api-key-env KEYS`
    """
    options: dict[str, Any] = {
        "serve.host": host,
        "serve.port": port,
        "serve.api_key_env": api_key_env,
        "rollout.chunk_size": chunk_size,
        "fleet.servers": server,
        "fleet.file": fleet,
        "fleet.engines": engines,
        "fleet.model": model,
        "fleet.kv_pool": kv_pool,
        "fleet.draft": draft,
    }
    resolved = config_from(config, set_ or [], options)
    refuse_unused(resolved.fleet, options)
    raise_file_limit()
    Keys(resolved.serve)  # a wrong host or key is found before engines are started, and so is a port that is taken
    require_free(resolved.serve.host, resolved.serve.port)
    uvloop.run(_run(resolved))


async def _run(config: Config) -> None:
    display = make_display("plain")
    run_dir = Path("runs") / time.strftime("serve-%Y%m%d-%H%M%S")
    async with engine_urls(config, run_dir, display) as urls:
        calm_gc()
        await serve_fleet(config, urls, say=typer.echo)
