"""Acceptance by group: what the drafts of each of a run's groups brought, gathered from the engines that draft.

An engine tells its latest groups apart and forgets the others, so it is asked now and then, and at the end.

Invariants: what an engine counted is added once, also when the run is resumed on an engine that has stayed up; at most
`MOST` groups are kept, those that were heard of last.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from seer_async.errors import EngineError
from seer_async.sampling import DRAFTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from seer_async.engine import EngineClient
    from seer_async.runfolder import RunInfo

MOST = 4096
ASK_S = 15.0  # an engine has to go through 256 groups in between before one is missed
_TIMEOUT_S = 2.0
_NONE = (0, 0, 0)

Counts = tuple[int, int, int]
"""Drafts verified, tokens drafted, tokens accepted."""
Life = tuple[str, str]
"""An engine's URL and boot."""


class DraftGroups:
    """Counts of one run by group; they live in its `RunInfo`."""

    def __init__(self, info: RunInfo, clients: Mapping[str, EngineClient]) -> None:
        self._counts = info.draft_groups
        self._prefix = f"{info.run}/"
        self._clients = clients
        self._told: dict[tuple[Life, str], Counts] = {}  # what each has said of each group
        # Those that an earlier part of the run has heard: what they say first has been counted.
        self._known = {(entry["url"], entry["info"]["boot"]) for entry in info.engines if entry.get("info")}

    async def follow(self) -> None:
        """Ask until cancelled."""
        while True:
            await self.ask()
            await asyncio.sleep(ASK_S)

    async def ask(self) -> None:
        """Ask all engines that draft; one that does not answer is left out."""
        drafting = [client for client in self._clients.values() if client.info and DRAFTS in client.info.capabilities]
        async with asyncio.TaskGroup() as tasks:  # unlike gather it never loses a cancellation
            for client in drafting:
                tasks.create_task(self._ask(client))

    async def _ask(self, client: EngineClient) -> None:
        assert client.info is not None
        life = (client.url, client.info.boot)
        with suppress(EngineError):
            self.hear(life, await client.draft_groups(timeout_s=_TIMEOUT_S))

    def hear(self, life: Life, groups: Mapping[str, Counts]) -> None:
        """Add what an engine has counted since it last said so; a group that it had forgotten begins anew there."""
        for name, counts in self._own(groups):
            before = self._told.get((life, name), _NONE)
            self._told[life, name] = counts
            if life in self._known or counts == before:
                continue
            since = before if counts[0] >= before[0] else _NONE
            total = self._counts.pop(name, _NONE)
            self._counts[name] = (
                total[0] + counts[0] - since[0],
                total[1] + counts[1] - since[1],
                total[2] + counts[2] - since[2],
            )
            if len(self._counts) > MOST:
                del self._counts[next(iter(self._counts))]
        self._known.discard(life)

    def _own(self, groups: Mapping[str, Counts]) -> Iterable[tuple[str, Counts]]:
        for name, counts in groups.items():
            if name.startswith(self._prefix):
                yield name.removeprefix(self._prefix), counts
