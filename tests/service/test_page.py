"""The status page in a real browser: what it shows is what /v1/status says, whatever engines and clients are called."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.service.browser import CHROMIUM, browsing
from tests.service.serving import FAST, SLOW, mock_engines, prompts, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.live.engines import MockProcess
    from tests.service.browser import Tab

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
READY = "!document.getElementById('main').hidden"
HOSTILE = '<img src=x onerror="alert(1)">\u202e\x07'

SMUGGLED = """new Promise((done) => {
    addEventListener("securitypolicyviolation", (event) => done(event.violatedDirective));
    const script = document.createElement("script");
    script.textContent = "window.broken = 1";
    document.body.append(script);
})"""


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    async with browsing(tmp_path / "browser") as tab:
        yield tab


@pytest.fixture(scope="module")
def fast() -> Iterator[list[MockProcess]]:
    with mock_engines(FAST, FAST) as engines:
        yield engines


async def text(tab: Tab, selector: str) -> str:
    return await tab.evaluate(f"document.querySelector({selector!r}).innerText")


async def rollout(client: httpx.AsyncClient, count: int, n: int, **fields: Any) -> str:
    reply = await client.post("/v1/rollouts", json={"prompts": prompts(count), "n": n} | fields)
    return reply.json()["id"]


@needs_browser
async def test_the_numbers_are_those_of_the_status(fast: list[MockProcess], tmp_path: Path, tab: Tab) -> None:
    """Everything has ended, so that page and status speak of the same moment."""
    async with served(fast, tmp_path / "s") as app, httpx.AsyncClient(base_url=app.url, timeout=30) as client:
        job = await rollout(client, 10, 4)
        (await client.get(f"/v1/rollouts/{job}/samples")).raise_for_status()
        await asyncio.sleep(0.6)
        status = (await client.get("/v1/status")).json()
        assert (status["snapshot"]["done"], status["lengths"]["count"], sum(status["lengths"]["bins"])) == (40, 40, 40)
        await tab.look(width=1280)
        await tab.open(app.url + "/")
        await tab.until(READY)
        assert await text(tab, "#v-done") == "40"
        assert await text(tab, "#v-running") == "0"
        assert (
            await text(tab, "#m-running") == f"of {sum(each['slots'] for each in status['snapshot']['engines'])} slots"
        )
        lengths = status["lengths"]
        assert await text(tab, "#lengths-note") == (
            f"40 responses, median {lengths['median']}, p90 {lengths['p90']}, p99 {lengths['p99']}"
        )
        assert await tab.evaluate("document.querySelectorAll('#lengths rect').length") == sum(
            map(bool, lengths["bins"])
        )
        assert await text(tab, "#engines-note") == "2 of 2 up"
        shown = await text(tab, "#engines")
        assert all(engine["url"] in shown for engine in status["engines"])
        shown = await text(tab, "#rollouts")
        assert job in shown and "done" in shown and "40 / 40" in shown
        assert await text(tab, "#about") == f"{status['model']}, weights {status['version']}"
        assert tab.complaints == []


@needs_browser
async def test_it_follows_what_happens(tmp_path: Path, tab: Tab) -> None:
    with mock_engines([*SLOW, "--draft-acceptance", "0.7"]) as engines:
        async with served(engines, tmp_path / "s") as app, httpx.AsyncClient(base_url=app.url, timeout=30) as client:
            await tab.open(app.url + "/")
            await tab.until(f"{READY} && document.getElementById('v-running').innerText === '0'")
            await rollout(client, 4, 8, sampling={"max_tokens": 1500, "ignore_eos": True})
            await tab.until("Number(document.getElementById('v-running').innerText) > 8")
            await tab.until("document.querySelectorAll('#groups .row').length === 4")
            await tab.until("document.querySelectorAll('#tail .row').length === 8")
            await tab.until("document.querySelector('#throughput path') !== null")
            await tab.until(
                r"/Accepted by position\s+([\d.]+% ){3}[\d.]+%/.test(document.getElementById('drafts').innerText)"
            )
            engines[0].kill()
            await tab.until("document.querySelector('#engines .pill.bad') !== null")
            await tab.until("document.getElementById('engines').innerText.includes('Last error')")
            await tab.look(width=390)
            assert await tab.evaluate("document.documentElement.scrollWidth") == 390
            assert tab.complaints == []
        await tab.until("!document.getElementById('banner').hidden")
        assert await text(tab, "#live") == "not reachable"


@needs_browser
async def test_hostile_names_stay_text(fast: list[MockProcess], tmp_path: Path, tab: Tab) -> None:
    async with served(fast, tmp_path / "s") as app:
        await tab.open(app.url + "/")
        await tab.until(READY)
        app.service.core.instances["engine-0"].last_error = HOSTILE
        app.service.core.versions.current = HOSTILE
        await tab.until("document.getElementById('engines').innerText.includes('onerror')")
        await tab.until("document.getElementById('about').innerText.includes('onerror')")
        assert await tab.evaluate("document.querySelectorAll('img').length") == 0
        assert "\u202e" not in await text(tab, "body")
        assert tab.complaints == []
        assert "script-src" in await tab.evaluate(SMUGGLED)
        assert await tab.evaluate("window.broken === undefined")


@needs_browser
@pytest.mark.parametrize("how", ["form", "address"])
async def test_a_key(fast: list[MockProcess], tmp_path: Path, tab: Tab, how: str) -> None:
    async with served(fast, tmp_path / "s", key="sesame") as app:
        await tab.open(app.url + "/" + ("?key=sesame" if how == "address" else ""))
        if how == "form":
            await tab.until("!document.getElementById('ask').hidden")
            for key in ("wrong", "w\u00f6rse", "sesame"):
                await tab.evaluate(
                    f"document.getElementById('key').value = {key!r}; document.getElementById('ask').requestSubmit()"
                )
                if key != "sesame":
                    await tab.until("document.getElementById('asked').innerText.includes('does not accept')")
        await tab.until(READY)
        assert await tab.evaluate("location.search + location.hash") == ""
        await tab.call("Page.reload")
        await tab.until(f"document.readyState === 'complete' && {READY}")


async def test_the_page_is_self_contained(fast: list[MockProcess], tmp_path: Path) -> None:
    async with served(fast, tmp_path, key="sesame") as app, httpx.AsyncClient(base_url=app.url, timeout=30) as client:
        page = await client.get("/")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert not re.findall(r"(?:src|href)=\"(?!data:)", page.text)
        assert "innerHTML" not in page.text
        assert (await client.get("/v1/status")).status_code == 401
        with_key = await client.get("/v1/status", headers={"Authorization": "Bearer sesame"})
        assert with_key.status_code == 200
