"""`seer mock-engine`: run a mock engine in the foreground."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated

import typer
import uvloop

from seer_async.errors import ConfigError
from seer_servers.listening import require_free
from seer_servers.mock import KV, LanguageModel, MockConfig, MockServer, Speed, serve
from seer_servers.mock.faults import DESCRIPTIONS, parse_fault

_FAULT_HELP = (
    "Misbehave: NAME to do it on every call, NAME:PROBABILITY to do it on some, as in hang:0.01. Repeat for several. "
    "POST /mock/faults changes them later. Names: " + ", ".join(DESCRIPTIONS) + "."
)


def mock_engine(  # noqa: PLR0917 - Typer makes each parameter an option
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback only together with --api-key-env.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    model: Annotated[str, typer.Option(help="Served model name; calls for another name get a 404.")] = "mock",
    seed: Annotated[
        int, typer.Option(help="The mock's weights: engines with the same seed and options give the same responses.")
    ] = LanguageModel().seed,
    mean_length: Annotated[
        float, typer.Option(help="Mean response length over all prompts, in tokens.")
    ] = LanguageModel().mean_length,
    sigma: Annotated[
        float,
        typer.Option(help="How much expected lengths differ between prompts (of their logarithm); 0: not at all."),
    ] = LanguageModel().sigma,
    vocab_size: Annotated[
        int, typer.Option(help="Number of token ids; 3 to 258 are bytes.")
    ] = LanguageModel().vocab_size,
    max_model_len: Annotated[
        int, typer.Option(help="Longest prompt plus response, in tokens.")
    ] = MockConfig().max_model_len,
    world_size: Annotated[int, typer.Option(help="Workers that the engine says it has.")] = MockConfig().world_size,
    draft_acceptance: Annotated[
        float,
        typer.Option(help="Count drafts, of whose first token this share is accepted; 0: none. They save no time."),
    ] = MockConfig().draft_acceptance,
    num_blocks: Annotated[
        int, typer.Option(help="KV memory in blocks. Few blocks make requests wait and be preempted.")
    ] = KV().num_blocks,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = KV().block_size,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests running at the same time.")] = KV().max_num_seqs,
    step_ms: Annotated[float, typer.Option(help="Time of an engine step at batch 0, in ms.")] = Speed().step_ms,
    per_request_ms: Annotated[
        float, typer.Option(help="Time that each running request adds to a step, in ms.")
    ] = Speed().per_request_ms,
    prefill_rate: Annotated[
        float, typer.Option(help="Prompt tokens per second not found in the prefix cache; decoding waits meanwhile.")
    ] = Speed().prefill_rate,
    time_scale: Annotated[
        float, typer.Option(help="Stretch all simulated times; 0 answers at once, to measure the orchestrator alone.")
    ] = Speed().time_scale,
    fault: Annotated[list[str] | None, typer.Option(help=_FAULT_HELP, metavar="NAME[:PROBABILITY]")] = None,
    weight_version: Annotated[
        str, typer.Option(help="Weight version at the start; another one gives other responses.")
    ] = LanguageModel().version,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable that holds the API key for the routes vLLM guards.", metavar="NAME"),
    ] = None,
) -> None:
    """Run a mock engine: the wire of a vLLM server with Seer's plug-in, without a model.

    Responses are a pure function of the tokens so far and the request's seed, so however an orchestrator cuts, moves
    and repeats its calls, it must end with the tokens of one undivided call. Use it to test an orchestrator for speed
    (--time-scale 0), for scheduling (few --num-blocks, a large --sigma) and for faults (--fault).

    Prints "mock engine ready at URL" when it listens, and stops on Ctrl-C.
    """
    config = MockConfig(
        name=model,
        max_model_len=max_model_len,
        world_size=world_size,
        draft_acceptance=draft_acceptance,
        model=LanguageModel(
            seed=seed,
            mean_length=mean_length,
            sigma=sigma,
            vocab_size=vocab_size,
            version=weight_version,
        ),
        speed=Speed(
            step_ms=step_ms,
            per_request_ms=per_request_ms,
            prefill_rate=prefill_rate,
            time_scale=time_scale,
        ),
        kv=KV(num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs),
    )
    api_key = _api_key(api_key_env)
    if not api_key and not _is_loopback(host):
        raise ConfigError(f"--host {host} can be reached from elsewhere: set --api-key-env too, or use 127.0.0.1")
    require_free(host, port)
    uvloop.run(_run(config, dict(map(parse_fault, fault or [])), api_key, host, port))


async def _run(config: MockConfig, faults: dict[str, float], api_key: str | None, host: str, port: int) -> None:
    await serve(MockServer(config, faults=faults, api_key=api_key), host, port)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if key := os.environ.get(variable):
        return key
    raise ConfigError(f"--api-key-env {variable}: that environment variable is not set or empty")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
