"""The pool for more than one machine, run on this one: Mooncake's master, a standalone store, and vLLM's own connector.

Invariants: the blocks live in the store, never in an engine, so an engine that dies takes none along; a daemon that
dies is started again, as long as the pool lives, and what it held is computed again; an engine without its pool
recomputes; keys carry `namespace`, so only engines of one model and dtype see each other's blocks.

What listens where: the master (RPC and HTTP) and the store's RPC listen on the loopback interface. Mooncake's transfer
engine cannot be bound: the store and each engine listen on every interface with two ports of it, a handshake and the
data, neither authenticated; who reaches the second can read and overwrite blocks. Run this pool where nobody can.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from seer_async.errors import FleetError
from seer_servers.ports import HOST, Ports
from seer_servers.process import Process

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BIN = Path(sys.executable).parent
LIBRARIES = Path(sys.prefix) / "lib" / "mooncake"  # where setup unpacks what the system lacks
START_TIMEOUT_S = 30.0
POLL_S = 0.1
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
STABLE_S = 60.0  # a life this long ends a row of failures
CLIENT_TTL_S = 3  # how long the master believes in a store that is silent
LOCAL_BUFFER_BYTES = 128 << 20  # per engine; only values that are no block go through it
MAX_BUCKET_BYTES = 256 << 20  # Mooncake's own choice of a file's size on disk
RPC_TIMEOUT_MS = 2000  # an engine waits no longer for a master that does not answer; the default is 30 s


class Service:
    """One daemon: started, kept alive, stopped."""

    def __init__(
        self, name: str, command: list[str], env: dict[str, str], log: Path, answers: Callable[[], Awaitable[bool]]
    ) -> None:
        self.name = name
        self._command = command
        self._env = env
        self._log = log
        self._answers = answers
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process of this life."""
        assert self._process is not None, "start() comes first"
        return self._process

    async def start(self) -> None:
        """Start the daemon and return when it answers.

        Raises:
            FleetError: It ended, or does not answer in `START_TIMEOUT_S` seconds.
        """
        await self.stop()
        self._process = await Process.start(self._command, self._env, self._log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await self._answers():
            if not self.process.alive:
                raise FleetError(f"{self.name} ended while it started: {self._why()}")
            if time.monotonic() > deadline:
                raise FleetError(f"{self.name} does not answer after {START_TIMEOUT_S:.0f} s: {self._why()}")
            await asyncio.sleep(POLL_S)

    async def keep(self) -> None:
        """Start the daemon again whenever it dies; engines do without it in the meantime."""
        backoff = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            await self.process.wait()
            if time.monotonic() - started > STABLE_S:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_S)
            with contextlib.suppress(FleetError):  # the next turn tries again
                await self.start()

    async def stop(self) -> None:
        """End the daemon, if it runs."""
        if self._process is not None:
            await self._process.stop()

    def _why(self) -> str:
        return f"{self.process.last_words()}\n(more in {self._log})"


class MooncakePool:
    """One fleet's pool: `capacity_bytes` of memory in the store, and the folder `ssd` behind it, if there is one.

    `namespace` goes into every key: see `model_namespace`.
    """

    kind = "mooncake"

    def __init__(self, folder: Path, capacity_bytes: int, ssd: Path | None = None, *, namespace: str = "seer") -> None:
        self._folder = folder
        self._capacity = capacity_bytes
        self._namespace = namespace
        self._ports = Ports(3)
        self._master_port, self._http_port, self._store_port = self._ports
        self._ssd = ssd / f"seer-mooncake-{self._master_port}" if ssd else None
        self._keepers: list[asyncio.Task[None]] = []
        self.master = self._service("mooncake_master", self._master_command(), self._master_answers)
        self.store = self._service("mooncake_client", self._store_command(), self._store_answers)

    async def start(self) -> None:
        """Start the master, then the store.

        Raises:
            FleetError: Mooncake is not installed, lacks a library, or does not come up; says what to do.
        """
        await asyncio.to_thread(check_installed)
        try:
            self._config_file.parent.mkdir(parents=True, exist_ok=True)
            if self._ssd is not None:
                self._ssd.mkdir(parents=True, exist_ok=True)
            self._config_file.write_text(json.dumps(self._config(), indent=2))
            for service in (self.master, self.store):
                await service.start()
        except OSError as error:
            raise FleetError(f"the KV pool cannot write {error.filename}: {error.strerror}") from error
        except BaseException:
            await self.stop()
            raise
        self._keepers = [asyncio.create_task(service.keep()) for service in (self.master, self.store)]

    async def stop(self) -> None:
        """Stop both daemons and delete what they wrote to the SSD; the logs stay."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(self.store.stop(), self.master.stop(), return_exceptions=True)
        if self._ssd is not None:
            await asyncio.to_thread(shutil.rmtree, self._ssd, ignore_errors=True)

    def arguments(self, index: int) -> list[str]:
        """Return the connector's configuration for engine `index`."""
        return ["--kv-transfer-config", json.dumps(self._transfer_config(index))]

    def env(self, index: int) -> dict[str, str]:
        """Return what the connector reads from the environment."""
        del index
        return library_path() | {
            "MOONCAKE_CONFIG_PATH": str(self._config_file),
            "MOONCAKE_REQUESTER_LOCAL_HOSTNAME": HOST,
            "MOONCAKE_STORE_CHECKSUM": "true",  # a block that changed in the store fails to load and is computed again
            "MC_TCP_BIND_ADDRESS": HOST,  # the address that others are told, not the one it listens on
            "MC_RPC_TIMEOUT_MS": str(RPC_TIMEOUT_MS),
            "MC_RPC_CONNECT_TIMEOUT_MS": str(RPC_TIMEOUT_MS),
        }

    @property
    def _config_file(self) -> Path:
        return self._folder / "mooncake.json"

    def _config(self) -> dict[str, object]:
        """Return what vLLM's connector reads to find the store."""
        return {
            "mode": "standalone-store",
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": f"{HOST}:{self._master_port}",
            "protocol": "tcp",
            "device_name": "",
            "global_segment_size": 0,
            "local_buffer_size": LOCAL_BUFFER_BYTES,
            "enable_offload": self._ssd is not None,
        }

    def _transfer_config(self, index: int) -> dict[str, object]:
        return {
            "kv_connector": "MooncakeStoreConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "load_async": True,
                "lookup_async": True,  # else a master that hangs stops the engine's every step
                "save_decode_cache": True,
                "cache_prefix": self._namespace,
                # Names a socket file, which must differ between all engines of a host, other fleets' too.
                "lookup_rpc_port": f"{self._master_port}-{index}",
                "master_http": f"http://{HOST}:{self._http_port}",  # ours: the connector passes over it
            },
        }

    def _service(self, name: str, arguments: list[str], answers: Callable[[], Awaitable[bool]]) -> Service:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MOONCAKE_", "MC_"))}
        env = inherited | library_path() | {"MC_TCP_BIND_ADDRESS": HOST} | self._ssd_env()
        return Service(name, [str(BIN / name), *arguments], env, self._folder / "logs" / f"{name}.log", answers)

    def _master_command(self) -> list[str]:
        return [
            f"--rpc_address={HOST}",
            f"--rpc_port={self._master_port}",
            f"--metrics_host={HOST}",
            f"--metrics_port={self._http_port}",
            f"--client_ttl={CLIENT_TTL_S}",
            *(["--enable_offload=true", "--offload_on_evict=true"] if self._ssd else []),
        ]

    def _store_command(self) -> list[str]:
        return [
            f"--host={HOST}",
            f"--port={self._store_port}",
            f"--master_server_address={HOST}:{self._master_port}",
            "--metadata_server=P2PHANDSHAKE",
            "--protocol=tcp",
            f"--global_segment_size={self._capacity} B",
            *(["--enable_offload=true"] if self._ssd else []),
        ]

    def _ssd_env(self) -> dict[str, str]:
        if self._ssd is None:
            return {}
        return {
            "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": str(self._ssd),
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",  # what is evicted waits for this; the default is 10
            # Written only when a bucket is full: one that does not fit in memory many times would never be.
            "MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES": str(min(MAX_BUCKET_BYTES, self._capacity // 16)),
        }

    async def _master_answers(self) -> bool:
        return await self._ask("/health") is not None

    async def _store_answers(self) -> bool:
        return bool(await self._ask("/get_all_segments"))

    async def _ask(self, path: str) -> str | None:
        """Return what the master's HTTP port says, None if it says nothing good."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
                session.get(f"http://{HOST}:{self._http_port}{path}") as reply,
            ):
                return (await reply.text()).strip() if reply.ok else None
        return None


def model_namespace(model: str, dtype: str | None) -> str:
    """Name what blocks are valid for: the model folder's name, the dtype asked for, and a digest of config and weights.

    The digest covers config.json and the names and sizes of the weight files; reading gigabytes would take too long.
    """
    folder = Path(model)
    weights = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    config = folder / "config.json"
    content = (config.read_bytes() if config.is_file() else b"") + repr(weights).encode()
    return f"{folder.name}:{dtype or 'auto'}:{hashlib.blake2b(content, digest_size=6).hexdigest()}"


def library_path() -> dict[str, str]:
    """Return the environment in which the loader finds the libraries that setup unpacked, {} if it unpacked none."""
    if not LIBRARIES.is_dir():
        return {}
    return {"LD_LIBRARY_PATH": ":".join(filter(None, (str(LIBRARIES), os.environ.get("LD_LIBRARY_PATH"))))}


def check_installed() -> None:
    """Load Mooncake as an engine would.

    Raises:
        FleetError: The package or one of its shared libraries is missing; says how to install it.
    """
    command = [sys.executable, "-c", "import mooncake.store"]
    done = subprocess.run(  # noqa: S603 - our own words, no shell
        command, env=os.environ | library_path(), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    said = done.stderr.strip().rpartition("\n")[2]
    if library := re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", said):
        raise FleetError(
            f"Mooncake needs the shared library {library[1]}: install the system packages libibverbs1 and librdmacm1 "
            "(Debian's names), or run `make setup`, which unpacks them without root; or use --kv-pool shm"
        )
    if "ModuleNotFoundError" in said:
        raise FleetError(
            "the package mooncake-transfer-engine-non-cuda (with GPUs: mooncake-transfer-engine-cuda13) is not "
            "installed: run `pip install '.[mooncake]'` in Seer's folder (with GPUs: '.[mooncake-gpu]'); or use "
            "--kv-pool shm"
        )
    raise FleetError(f"Mooncake cannot be loaded ({said}): reinstall it, or use --kv-pool shm")
