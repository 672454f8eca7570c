"""The commands that run a fleet's engines on several machines, for whoever starts processes there: a shell, Slurm, Ray.

Invariant: what is printed is a shell script in which each command says on which machine it belongs; engines get the
same arguments as local ones, with addresses that other machines reach.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from seer_async.errors import UsageError
from seer_servers.fleet import ENV
from seer_servers.placement import GIB, Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_servers.fleet import EngineSpec

ENGINE_PORT = 8000
_NEEDED = ("VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE")
_MASTER_PORT, _MASTER_HTTP_PORT, _STORE_PORT = 50051, 9003, 50052
_HEAD = """\
# On every machine: vLLM and Seer in one environment, and the model under the same name. vLLM's control routes
# ask for no password: use addresses of a network where nobody else is.
"""


class Node(NamedTuple):
    """Where an engine listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{self.host}:{self.port}"


class Wiring(NamedTuple):
    """What the pool adds: blocks of commands that come first, and each engine's arguments and environment."""

    services: list[str]
    arguments: list[list[str]]
    env: list[dict[str, str]]


def parse_node(text: str) -> Node:
    """Read HOST or HOST:PORT.

    Raises:
        UsageError: It is neither.
    """
    host, colon, port = text.partition(":")
    if not host or (colon and not port.isdecimal()):
        raise UsageError(f"--node {text!r} must be HOST or HOST:PORT, for example 10.0.0.1:8000")
    return Node(host, int(port) if colon else ENGINE_PORT)


def script(spec: EngineSpec, nodes: Sequence[Node], pool: str, pool_gib: float) -> str:
    """Return the commands, and the fleet file that lists the engines.

    Raises:
        UsageError: Two engines would listen at one address, or the pool does not reach from one to another.
    """
    if len(set(nodes)) < len(nodes):
        raise UsageError("--node: two engines of a machine need different ports, for example 10.0.0.1:8001")
    if pool not in _WIRING:
        raise UsageError(f"--kv-pool must be one of {', '.join(_WIRING)}, not {pool!r}")
    wiring = _WIRING[pool](spec, nodes, int(pool_gib * GIB))
    engines = [
        f"# {node.host}: engine-{i}\n{_engine(spec, node, wiring.arguments[i], wiring.env[i])}"
        for i, node in enumerate(nodes)
    ]
    entries = [{"name": f"engine-{i}", "url": node.url} for i, node in enumerate(nodes)]
    fleet = f"# where the rollout runs: seer rollout --fleet fleet.json\n{_file('fleet.json', {'engines': entries})}"
    return "\n".join([_HEAD, *wiring.services, *engines, fleet])


def _engine(spec: EngineSpec, node: Node, pooling: list[str], pool_env: dict[str, str]) -> str:
    env = {name: ENV[name] for name in _NEEDED} | pool_env | spec.extra_env
    words = spec.arguments(node.port, Placement({}, {}, gpu=True), node.host)
    at = words.index("--model")
    command = ["vllm", "serve", spec.model, *words[:at], *words[at + 2 :], *pooling]
    return f"{' '.join(f'{name}={shlex.quote(value)}' for name, value in env.items())} \\\n  {shlex.join(command)}\n"


def _file(name: str, content: object) -> str:
    return f"cat > {name} <<'END'\n{msgspec.json.format(msgspec.json.encode(content)).decode()}\nEND\n"


def _without(spec: EngineSpec, nodes: Sequence[Node], capacity: int) -> Wiring:
    del spec, capacity
    return Wiring([], [[] for _ in nodes], [{} for _ in nodes])


def _shared_memory(spec: EngineSpec, nodes: Sequence[Node], capacity: int) -> Wiring:
    from seer_servers.kvpool.shm.pool import transfer_config  # noqa: PLC0415 - only what is wanted
    from seer_servers.kvpool.shm.settings import Settings  # noqa: PLC0415 - as above

    del spec
    if len({node.host for node in nodes}) == len(nodes):
        raise UsageError(
            "--kv-pool shm is shared by the engines of one machine, and here each machine has one; use mooncake or none"
        )
    settings = Settings(root=Path("/dev/shm/seer-kv-fleet"), capacity_bytes=capacity)  # noqa: S108 - made with mode 700
    words = ["--kv-transfer-config", json.dumps(transfer_config(settings))]
    return Wiring([], [words for _ in nodes], [{} for _ in nodes])


def _mooncake(spec: EngineSpec, nodes: Sequence[Node], capacity: int) -> Wiring:
    from seer_servers.kvpool.mooncake import MooncakePool, model_namespace  # noqa: PLC0415 - as above

    pool = MooncakePool(Path(), capacity, namespace=model_namespace(spec.model, spec.dtype))
    first = nodes[0].host
    hosts = list(dict.fromkeys(node.host for node in nodes))
    master = f"# {first}: the KV pool's master\n{_master(first)}"
    stores = [f"# {host}: its part of the KV pool\n{_store(host, first, capacity)}" for host in hosts]
    arguments = [_redirected(pool.arguments(i), i, first) for i in range(len(nodes))]
    return Wiring([master, *stores], arguments, [_mooncake_env(pool.env(i), node) for i, node in enumerate(nodes)])


def _master(host: str) -> str:
    ports = f"--rpc_port={_MASTER_PORT} --metrics_host={host} --metrics_port={_MASTER_HTTP_PORT}"
    return f"mooncake_master --rpc_address={host} {ports} --client_ttl=3\n"


def _store(host: str, master: str, capacity: int) -> str:
    where = f"--host={host} --port={_STORE_PORT} --master_server_address={master}:{_MASTER_PORT}"
    rest = f"--metadata_server=P2PHANDSHAKE --protocol=tcp --global_segment_size='{capacity} B'"
    config = {
        "mode": "standalone-store",
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"{master}:{_MASTER_PORT}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": 0,
        "local_buffer_size": "128MB",
    }
    return f"{_file('mooncake.json', config)}mooncake_client {where} {rest}\n"


def _redirected(words: list[str], index: int, master: str) -> list[str]:
    """The arguments of a local engine, with the master where other machines find it."""
    option, text = words
    config = json.loads(text)
    config["kv_connector_extra_config"] |= {
        "lookup_rpc_port": str(index),
        "master_http": f"http://{master}:{_MASTER_HTTP_PORT}",
    }
    return [option, json.dumps(config)]


def _mooncake_env(env: dict[str, str], node: Node) -> dict[str, str]:
    mine = {name: value for name, value in env.items() if name.startswith(("MOONCAKE_", "MC_"))}
    return mine | {"MOONCAKE_REQUESTER_LOCAL_HOSTNAME": node.host, "MC_TCP_BIND_ADDRESS": node.host}


_WIRING = {"none": _without, "shm": _shared_memory, "mooncake": _mooncake}
