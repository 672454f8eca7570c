"""Clients of `seer serve`: rollouts as they finish, over connections that may drop.

    with Client("http://127.0.0.1:8100") as client:
        for sample in client.rollout(["Why is the sky blue?"], n=16, temperature=0.8):
            ...

Invariants: an iteration yields every item once and in the server's order, however often the connection drops or the
server says that it is busy, as long as it makes progress at least every `patience_s`; a rollout is begun once, however
often the request for it had to be repeated; the key goes into the header and nowhere else.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx
import msgspec

from seer_async.api import FleetStatus, GroupSamples, RolloutList, RolloutStatus
from seer_async.clientcalls import (
    FINE,
    GONE,
    STREAM_TIMEOUT,
    Lines,
    Patience,
    RolloutError,
    begin_options,
    check,
    client_options,
    decoded,
    ended,
    samples_path,
    update_calls,
)
from seer_async.types import Sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from seer_async.clientcalls import PromptLike
    from seer_async.snapshot import EngineView

__all__ = ["AsyncClient", "AsyncRollout", "Client", "Rollout", "RolloutError"]

T = TypeVar("T")


class Client:
    """Calls to the server at `url`. Methods raise SeerError for what the server refuses."""

    def __init__(self, url: str, *, api_key: str | None = None, patience_s: float = 120.0) -> None:
        self._http = httpx.Client(**client_options(url, api_key))
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def rollout(
        self,
        prompts: Iterable[PromptLike],
        *,
        n: int | None = None,
        chunk_size: int | None = None,
        model: str | None = None,
        **sampling: Any,
    ) -> Rollout:
        """Begin a rollout: `n` responses to each prompt, a text, token ids or a dataset line's fields."""
        options = begin_options(prompts, {"n": n, "chunk_size": chunk_size, "model": model}, sampling)
        return Rollout(self, self.call("POST", "/v1/rollouts", RolloutStatus, **options).id)

    def attach(self, rollout: str) -> Rollout:
        """A rollout that was begun before, by its id."""
        return Rollout(self, rollout)

    def rollouts(self) -> list[RolloutStatus]:
        """Every rollout that the server knows, newest first."""
        return self.call("GET", "/v1/rollouts", RolloutList).rollouts

    def status(self) -> FleetStatus:
        """The service now."""
        return self.call("GET", "/v1/status", FleetStatus)

    def workers(self) -> list[EngineView]:
        """The engines now."""
        return self.status().snapshot.engines

    def update_weights(self, version: str, info: dict[str, Any]) -> str:
        """Give all engines new weights, and return what they are called: `version`, unless others were called that.

        `info` tells vLLM's transfer engine where they are, as {"path": FOLDER} does for `seer_files`. Nothing is
        sampled meanwhile; responses that had begun begin again. After an error nothing is sampled until an update
        succeeds.
        """
        for path, options in update_calls(version, info):
            said = self.call("POST", path, dict[str, str], **options)
        return said["weight_version"]

    def call(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        """One call, repeated while the server is away or busy."""
        patience = Patience(self._patience_s)
        while True:
            try:
                return decoded(self._http.request(method, path, **options), kind)
            except GONE as error:
                time.sleep(patience.delay(error))

    def follow(self, rollout: str, by: str, after: int, kind: type[T]) -> Iterator[T]:
        """The items of a rollout, to its end."""
        patience, number = Patience(self._patience_s), after
        while True:
            try:
                with self._http.stream("GET", samples_path(rollout, by, number), timeout=STREAM_TIMEOUT) as reply:
                    if reply.status_code >= FINE:
                        reply.read()
                        check(reply)
                    lines = Lines()
                    for part in reply.iter_bytes():
                        patience.progress()
                        for line in lines.feed(part):
                            number += 1
                            yield msgspec.json.decode(line, type=kind)
                            patience.progress()  # however long the reader took
                if ended(self.call("GET", f"/v1/rollouts/{rollout}", RolloutStatus), by, number):
                    return
            except GONE as error:
                time.sleep(patience.delay(error))


class Rollout:
    """A rollout on the server. It goes on when nobody reads it, and can be read any number of times."""

    def __init__(self, client: Client, rollout: str) -> None:
        self.id = rollout
        self._client = client

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, after: int = 0) -> Iterator[Sample]:
        """Samples in the order in which they finish, without the first `after`.

        Raises:
            RolloutError: After the last one, if the rollout ended before it was done.
        """
        return self._client.follow(self.id, "sample", after, Sample)

    def groups(self, after: int = 0) -> Iterator[list[Sample]]:
        """Whole groups in the order in which they finish, without the first `after`; errors as `samples`."""
        return (each.samples for each in self._client.follow(self.id, "group", after, GroupSamples))

    def status(self) -> RolloutStatus:
        """The rollout now."""
        return self._client.call("GET", f"/v1/rollouts/{self.id}", RolloutStatus)

    def cancel(self) -> RolloutStatus:
        """Stop working for it; what has finished can still be read."""
        return self._client.call("DELETE", f"/v1/rollouts/{self.id}", RolloutStatus)


class AsyncClient:
    """What `Client` is, for asyncio."""

    def __init__(self, url: str, *, api_key: str | None = None, patience_s: float = 120.0) -> None:
        self._http = httpx.AsyncClient(**client_options(url, api_key))
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def rollout(
        self,
        prompts: Iterable[PromptLike],
        *,
        n: int | None = None,
        chunk_size: int | None = None,
        model: str | None = None,
        **sampling: Any,
    ) -> AsyncRollout:
        """See `Client.rollout`."""
        options = begin_options(prompts, {"n": n, "chunk_size": chunk_size, "model": model}, sampling)
        return AsyncRollout(self, (await self.call("POST", "/v1/rollouts", RolloutStatus, **options)).id)

    def attach(self, rollout: str) -> AsyncRollout:
        """See `Client.attach`."""
        return AsyncRollout(self, rollout)

    async def rollouts(self) -> list[RolloutStatus]:
        """See `Client.rollouts`."""
        return (await self.call("GET", "/v1/rollouts", RolloutList)).rollouts

    async def status(self) -> FleetStatus:
        """See `Client.status`."""
        return await self.call("GET", "/v1/status", FleetStatus)

    async def workers(self) -> list[EngineView]:
        """See `Client.workers`."""
        return (await self.status()).snapshot.engines

    async def update_weights(self, version: str, info: dict[str, Any]) -> str:
        """See `Client.update_weights`."""
        for path, options in update_calls(version, info):
            said = await self.call("POST", path, dict[str, str], **options)
        return said["weight_version"]

    async def call(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        """See `Client.call`."""
        patience = Patience(self._patience_s)
        while True:
            try:
                return decoded(await self._http.request(method, path, **options), kind)
            except GONE as error:
                await asyncio.sleep(patience.delay(error))

    async def follow(self, rollout: str, by: str, after: int, kind: type[T]) -> AsyncIterator[T]:
        """See `Client.follow`."""
        patience, number = Patience(self._patience_s), after
        while True:
            try:
                async with self._http.stream("GET", samples_path(rollout, by, number), timeout=STREAM_TIMEOUT) as reply:
                    if reply.status_code >= FINE:
                        await reply.aread()
                        check(reply)
                    lines = Lines()
                    async for part in reply.aiter_bytes():
                        patience.progress()
                        for line in lines.feed(part):
                            number += 1
                            yield msgspec.json.decode(line, type=kind)
                            patience.progress()  # however long the reader took
                if ended(await self.call("GET", f"/v1/rollouts/{rollout}", RolloutStatus), by, number):
                    return
            except GONE as error:
                await asyncio.sleep(patience.delay(error))


class AsyncRollout:
    """What `Rollout` is, for asyncio."""

    def __init__(self, client: AsyncClient, rollout: str) -> None:
        self.id = rollout
        self._client = client

    def __aiter__(self) -> AsyncIterator[Sample]:
        return self.samples()

    def samples(self, after: int = 0) -> AsyncIterator[Sample]:
        """See `Rollout.samples`."""
        return self._client.follow(self.id, "sample", after, Sample)

    async def groups(self, after: int = 0) -> AsyncIterator[list[Sample]]:
        """See `Rollout.groups`."""
        async for each in self._client.follow(self.id, "group", after, GroupSamples):
            yield each.samples

    async def status(self) -> RolloutStatus:
        """See `Rollout.status`."""
        return await self._client.call("GET", f"/v1/rollouts/{self.id}", RolloutStatus)

    async def cancel(self) -> RolloutStatus:
        """See `Rollout.cancel`."""
        return await self._client.call("DELETE", f"/v1/rollouts/{self.id}", RolloutStatus)
