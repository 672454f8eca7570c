"""An engine that drafts, as the tests of drafting talk to it."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from seer_async.dataset import default_dataset, read_dataset
from seer_async.engine import EngineClient, engine_session
from seer_async.wire import CallSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from seer_async.types import ChunkReply
    from seer_servers.fleet import LocalFleet

SIBLINGS = 4
TOKENS = 48


class Drafting:
    """One engine, which drafts."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self._client = EngineClient(url, session)

    async def attach(self) -> None:
        await self._client.attach(timeout_s=60, trial_timeout_s=120)

    async def prompt(self, number: int) -> list[int]:
        return await self._client.tokenize(read_dataset(default_dataset(), number + 1)[number], timeout_s=60)

    async def respond(self, prompt: list[int], seed: int, kin: dict[str, str], **params: Any) -> ChunkReply:
        info = self._client.info
        assert info is not None
        extra = {"seer_prompt_len": len(prompt)} | kin
        options = {"max_tokens": TOKENS, "temperature": 1.0, "seed": seed, "logprobs": 0, "extra_args": extra}
        spec = CallSpec(
            request_id=uuid.uuid4().hex,
            model=info.model,
            prefix=prompt,
            params=options | params,
            cache_salt="test-drafting",
            max_tokens=TOKENS,
        )
        return await self._client.generate(spec, info, timeout_s=300)

    async def siblings(self, prompt: list[int], group: str, **params: Any) -> list[ChunkReply]:
        """A group's responses, half of them first, so that the others have somebody to learn from."""
        replies: list[ChunkReply] = []
        for half in (range(SIBLINGS // 2), range(SIBLINGS // 2, SIBLINGS)):
            kin = [{"seer_group": group, "seer_request": str(i)} for i in half]
            replies += await asyncio.gather(
                *(self.respond(prompt, i, k, **params) for i, k in zip(half, kin, strict=True))
            )
        return replies

    async def inject(self, prompt: list[int], group: str) -> list[int]:
        """What is said to the prompt in another group, handed to the draft server as a reference of this one."""
        truth = await self.respond(prompt, 1, {"seer_group": "elsewhere", "seer_request": "x"}, temperature=0.0)
        body = {"group": group, "request": "solution", "token_ids": truth.token_ids}
        assert await self.post("update", body) == (200, {"tokens": len(truth.token_ids)})
        return truth.token_ids

    async def fetched(self) -> int:
        """Tokens that the engine has got from the draft server so far."""
        return int((await self.get("stats"))["sync_fetched_tokens"])

    async def repeats(self, prompt: list[int], group: str, truth: list[int]) -> int:
        """Tokens that drafts have right when a response to the prompt says the same again."""
        before = await self.accepted()
        again = await self.respond(prompt, 2, {"seer_group": group, "seer_request": "0"}, temperature=0.0)
        assert again.token_ids == truth
        return await self.accepted() - before

    @asynccontextmanager
    async def switched_off(self) -> AsyncIterator[None]:
        assert (await self.post("config", {"enabled": False}))[0] == 200
        try:
            yield
        finally:
            assert (await self.post("config", {"enabled": True}))[0] == 200

    async def get(self, path: str) -> dict[str, Any]:
        async with self._session.get(f"{self.url}/v1/seer/drafts/{path}") as reply:
            assert reply.ok, await reply.text()
            return await reply.json()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(f"{self.url}/v1/seer/drafts/{path}", json=body) as reply:
            return reply.status, await reply.json()

    async def accepted(self) -> int:
        """Tokens that drafts had right so far, by vLLM's own count."""
        await asyncio.sleep(0.6)
        stats = (await self._client.stats(timeout_s=30)).drafts
        assert stats is not None
        return stats.accepted


@asynccontextmanager
async def drafting(fleet: LocalFleet) -> AsyncIterator[Drafting]:
    async with engine_session() as session:
        engine = Drafting(fleet.urls[0], session)
        await engine.attach()
        assert (await engine.post("config", {"adaptive": False}))[0] == 200  # however little a busy machine gains
        try:
            yield engine
        finally:
            assert (await engine.post("config", {"adaptive": True}))[0] == 200
