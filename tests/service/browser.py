"""A real headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
from itertools import count
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page. `complaints` are errors of its scripts, its console and its policy."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self._answers[number], 30)

    async def _read(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said.get("result", said))
            elif said["method"] in {"Runtime.exceptionThrown", "Log.entryAdded"}:
                self.complaints.append(str(said["params"]))
            elif said["method"] == "Runtime.consoleAPICalled" and said["params"]["type"] in {"error", "warning"}:
                self.complaints.append(str(said["params"]["args"]))

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("location.protocol === 'http:' && document.readyState === 'complete'")

    async def evaluate(self, script: str) -> Any:
        options = {"expression": script, "returnByValue": True, "awaitPromise": True}
        while "error" in (said := await self.call("Runtime.evaluate", **options)):
            await asyncio.sleep(0.1)  # the page that was asked is gone, and another one is coming
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until a script's value is true."""
        async with asyncio.timeout(60):
            while not await self.evaluate(script):
                await asyncio.sleep(0.1)

    async def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Change the size of the screen, and the colours that its owner prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        said = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(said["data"]))

    async def close(self) -> None:
        await self._socket.close()
        await self._reading


@contextlib.asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Tab]:
    """A tab in a browser of its own, whose profile is in `folder`."""
    assert CHROMIUM
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *options,
        f"--user-data-dir={folder}",
        "about:blank",
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        port = await asyncio.wait_for(_port(process), 60)
        async with aiohttp.ClientSession() as session:
            url = await asyncio.wait_for(_page(session, port), 60)
            async with session.ws_connect(url, max_msg_size=0) as socket:
                tab = Tab(socket)
                yield tab
                await tab.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def _page(session: aiohttp.ClientSession, port: int) -> str:
    """Where the first page is spoken to; the browser listens before it has one."""
    while True:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            pages = [each for each in await reply.json() if each["type"] == "page"]
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(0.05)


async def _port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr
    while line := await process.stderr.readline():
        if b"DevTools listening on" in line:
            return int(line.decode().rsplit(":", 1)[1].split("/")[0])
    raise AssertionError("the browser does not start")
