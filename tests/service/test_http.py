"""What protects the service: keys, limits, refusals in vLLM's form, clients that hang up or say nothing."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from seer_async.config import ServeConfig
from seer_async.errors import ConfigError
from seer_servers.ports import Ports
from seer_servers.service.keys import Keys
from tests.live.engines import mock_engines, running
from tests.service.server import CHAT, COMPLETIONS, GENERATE, MESSAGES, PROMPT, SPEED, post, served

if TYPE_CHECKING:
    from pathlib import Path

    from tests.live.engines import MockProcess

SLOW = ["--step-ms", "50", "--mean-length", "1000"]
LONG = {"prompt": PROMPT, "n": 4, "max_tokens": 2000, "ignore_eos": True}


REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    (COMPLETIONS, {"prompt": "x", "echo": True}, 400, "echo is not supported"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, 400, "use_beam_search is not supported"),
    (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 0}, 400, "prompt_logprobs is not supported"),
    (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "does not exist"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, ">= 0"),
    (COMPLETIONS, {"prompt": "x", "temperature": 0, "n": 2}, 400, "n must be 1 when using greedy sampling"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 100_000}, 400, "maximum context length"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty must be from -2 to 2"),
    (COMPLETIONS, {"prompt": [10**6]}, 400, "out of vocabulary"),
    (COMPLETIONS, {}, 400, "prompt"),
    (CHAT, {"messages": "no"}, 400, "Expected `array`"),
    (CHAT, {"messages": MESSAGES, "repetition_detection": {"min_count": 2}}, 400, "repetition_detection"),
    (GENERATE, {"token_ids": [], "sampling_params": {}}, 400, "length >= 1"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"top_p": 7}}, 400, "top_p"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"extra_args": {"kv_transfer_params": {"a": 1}}}}, 400, "KV"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"n": "two"}}, 400, "Expected `int`"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"logprobs": -1}}, 400, "whole vocabulary"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"logprobs": 50}}, 400, "<= 20"),
    (GENERATE, {"token_ids": [10**6], "sampling_params": {}}, 400, "vocabulary"),
    (GENERATE, {"token_ids": [1], "sampling_params": {}, "output_mode": "text"}, 400, "output_mode"),
    (GENERATE, {"token_ids": [5] * 17_000, "sampling_params": {}}, 400, "no room"),
]


async def test_refusals(engines: list[MockProcess]) -> None:
    async with served(engines) as (service, client):
        for path, body, status, words in REFUSALS:
            error = (await post(client, path, status, **body))["error"]
            assert words in error["message"]
            assert error["code"] == status
            assert set(error) == {"message", "type", "param", "code"}
            assert not service.core.buffer.open


async def test_what_is_no_json(engines: list[MockProcess]) -> None:
    async with served(engines, serve={"port": 0, "max_body_mib": 0.1}) as (_, client):
        for content in (b"", b"{", b"\xff\xfe", b"[" * 20_000, b"null", b'"text"'):
            reply = await client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400)
        assert (await client.post(COMPLETIONS, content=b"{}")).status_code == 400
        large = await client.post(COMPLETIONS, json={"prompt": "x" * 200_000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, 413)
        assert (await client.get("/nowhere")).json()["error"]["type"] == "NotFoundError"
        assert (await client.get(COMPLETIONS)).status_code == 405
        for name in (b"X-Seer-Group", b"X-Request-Id"):
            reply = await client.post(COMPLETIONS, json={"prompt": "x"}, headers=[(name, b"\xff\xe4")])
            assert reply.status_code == 400


async def test_busy(engines: list[MockProcess]) -> None:
    async with served(engines, serve={"port": 0, "max_requests": 8}) as (service, client):
        task = asyncio.create_task(post(client, COMPLETIONS, prompt=PROMPT, n=4, max_tokens=400, ignore_eos=True))
        while service.core.buffer.open < 4:
            await asyncio.sleep(0.005)
        reply = await client.post(COMPLETIONS, json={"prompt": [PROMPT, PROMPT], "n": 3, "max_tokens": 5})
        assert reply.status_code == 429
        assert int(reply.headers["Retry-After"]) >= 1
        assert service.core.buffer.open == 4  # all or none
        await task
        await post(client, COMPLETIONS, prompt=[PROMPT, PROMPT], n=4, max_tokens=5)
        for body in ({"prompt": [PROMPT, PROMPT], "n": 5}, {"prompt": "x", "n": 10**9, "seed": 1}):
            assert "at most 8" in (await post(client, COMPLETIONS, 400, **body))["error"]["message"]


async def test_keys(engines: list[MockProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n")
    monkeypatch.setenv("KEYS", "one, two")
    options = {"port": 0, "api_key_env": "KEYS", "api_key_file": str(file)}
    async with served(engines, serve=options) as (_, client):

        async def status(key: str, path: str = "/v1/models") -> int:
            return (await client.get(path, headers={"Authorization": key})).status_code

        assert [await status(f"Bearer {key}") for key in ("one", "two", "from-file")] == [200, 200, 200]
        assert [await status(key) for key in ("", "one", "Bearer", "Bearer three", "Basic one")] == [401] * 5
        assert [await status("", path) for path in ("/health", "/metrics", "/openapi.json")] == [200] * 3
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).json() == {"error": "Unauthorized"}
        file.write_text("rotated\n")
        async with asyncio.timeout(60):
            while await status("Bearer rotated") != 200:
                await asyncio.sleep(0.1)
        assert await status("Bearer from-file") == 401


def test_no_public_address_without_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-key-env"):
            Keys(ServeConfig(host=host))
    with pytest.raises(ConfigError, match="api_key_file"):
        Keys(ServeConfig(api_key_file=str(tmp_path / "none")))
    for host in ("127.0.0.1", "::1", "localhost"):
        Keys(ServeConfig(host=host))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_frees_the_engines(stream: bool) -> None:
    with mock_engines(SLOW) as engines:
        async with served(engines) as (service, client):
            task = asyncio.create_task(client.post(COMPLETIONS, json=LONG | {"stream": stream}))
            while await running(engines[0]) < 4:
                await asyncio.sleep(0.02)
            task.cancel()
            async with asyncio.timeout(60):
                while service.core.buffer.open or await running(engines[0]):
                    await asyncio.sleep(0.02)


async def test_clients_that_say_nothing(engines: list[MockProcess]) -> None:
    options = {"port": 0, "body_timeout_s": 0.3, "keep_alive_s": 0.5}
    async with served(engines, serve=options) as (_, client):
        host, port = client.base_url.host, client.base_url.port
        silent, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert await asyncio.wait_for(silent.read(), 60) == b""
        slow, body = await asyncio.open_connection(host, port)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        body.write(head)
        assert (await asyncio.wait_for(slow.readline(), 60)).startswith(b"HTTP/1.1 408")
        for each in (writer, body):
            each.close()


async def test_engines_that_die() -> None:
    with mock_engines(SPEED, SPEED) as engines:
        async with served(engines) as (_, client):
            engines[0].kill()
            for _ in range(4):  # whoever is asked first
                await post(client, CHAT, messages=MESSAGES, max_tokens=3)
            engines[1].kill()
            reply = await client.post(GENERATE, json={"token_ids": PROMPT, "sampling_params": {"max_tokens": 3}})
            assert reply.status_code == 503
            assert "no usable engine" in reply.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 503
            assert (await post(client, COMPLETIONS, 503, prompt="x"))["error"]["code"] == 503


async def test_figures(engines: list[MockProcess]) -> None:
    async with served(engines) as (_, client):
        await post(client, COMPLETIONS, prompt=PROMPT, n=3, max_tokens=5)
        lines = (await client.get("/metrics")).text.splitlines()
    assert "seer_requests_done_total 3" in lines
    for engine in ("engine-0", "engine-1"):
        assert f'seer_engine_up{{engine="{engine}"}} 1' in lines
        assert any(line.startswith(f'vllm:num_requests_running{{engine="{engine}"') for line in lines)
    types = [line for line in lines if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("patient", [True, False])
async def test_the_command_ends_when_asked(patient: bool) -> None:
    """The first signal finishes what is open, the second gives it up."""
    with mock_engines(SPEED) as engines:
        ports = Ports(1)
        command = [sys.executable, "-m", "seer_cli.main", "serve", "--server", engines[0].url, "--port", str(ports[0])]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            line = (await process.stdout.readline()).decode()
            assert line == f"seer serve ready at http://127.0.0.1:{ports[0]}\n"
            async with httpx.AsyncClient(base_url=line.split()[-1], timeout=60) as client:
                body = {"prompt": PROMPT, "n": 2, "max_tokens": 1000 if patient else 15_000, "ignore_eos": True}
                task = asyncio.create_task(post(client, COMPLETIONS, **body))
                while await running(engines[0]) < 2:
                    await asyncio.sleep(0.02)
                assert not task.done()
                process.send_signal(signal.SIGTERM)
                if patient:
                    assert (await task)["usage"]["completion_tokens"] == 2000
                else:
                    assert b"once more" in await process.stdout.readline()  # two at once may count as one
                    process.send_signal(signal.SIGTERM)
                    with pytest.raises((AssertionError, httpx.HTTPError)):
                        await task
            assert await asyncio.wait_for(process.wait(), 60) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
