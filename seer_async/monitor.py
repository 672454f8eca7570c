"""The monitor of one engine: attaches it, reads its telemetry, and says when it is gone.

Invariants: an engine is up only between the `EngineUp` and the `EngineDown` of one epoch; a process that was started
anew is another epoch, however short it was away; after `stop` nothing is posted.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from seer_async.errors import EngineError, FailureKind
from seer_async.events import EngineDown, EngineReport, EngineUp

if TYPE_CHECKING:
    from collections.abc import Callable

    from seer_async.config import EngineConfig
    from seer_async.engine import EngineClient
    from seer_async.events import Event
    from seer_async.types import EngineInfo

TRIAL_TIMEOUT_S = 60.0  # for one token from an engine that others may keep busy
_RETRY_ATTACH_S = 1.0


class Monitor:
    """Follows one engine through its epochs.

    `accepts` says why an engine, by its name, cannot be used now, or None.
    """

    def __init__(
        self,
        name: str,
        client: EngineClient,
        config: EngineConfig,
        *,
        accepts: Callable[[str, EngineInfo], str | None],
        post: Callable[[Event], None],
    ) -> None:
        self._name = name
        self._client = client
        self._config = config
        self._accepts = accepts
        self._tell = post
        self._stopped = False
        self._suspect = asyncio.Event()

    def start(self, tasks: asyncio.TaskGroup, *, up: bool) -> None:
        """Follow the engine, which is `up` or not yet, in a task of its own until that is cancelled or this stopped."""
        self.task = tasks.create_task(self._run(up=up), name=f"monitor {self._name}")

    async def _run(self, *, up: bool) -> None:
        while not self._stopped:
            if not up:
                await self._attach()
            reason = await self._follow()
            up = False
            self._post(EngineDown(engine=self._name, reason=reason))

    def hurry(self) -> None:
        """Read its telemetry now."""
        self._suspect.set()

    def stop(self) -> None:
        """Post nothing more, and end. Cancelling the task alone would not do: libraries lose cancellations."""
        self._stopped = True
        self._suspect.set()
        self.task.cancel()

    def _post(self, event: Event) -> None:
        if not self._stopped:
            self._tell(event)

    async def _attach(self) -> None:
        while not self._stopped:
            with contextlib.suppress(EngineError):
                info = await self._client.attach(
                    timeout_s=self._config.probe_timeout_s, trial_timeout_s=TRIAL_TIMEOUT_S
                )
                if self._accepts(self._name, info) is None:
                    self._post(EngineUp(engine=self._name, info=info))
                    return
            await asyncio.sleep(_RETRY_ATTACH_S)

    async def _follow(self) -> str:
        """Read telemetry until the engine is gone; returns why it is thought to be."""
        silent = 0
        while not self._stopped:
            self._suspect.clear()
            try:
                stats = await self._client.stats(timeout_s=self._config.probe_timeout_s)
            except EngineError as error:
                silent += 1
                if silent >= self._config.silent_after or error.kind is FailureKind.CONNECTION:
                    return str(error)
            else:
                silent = 0
                info = self._client.info
                if info is None or stats.boot != info.boot:
                    return "the engine was restarted"
                self._post(EngineReport(engine=self._name, stats=stats))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.telemetry_s):  # wait_for may lose a cancellation before 3.12
                    await self._suspect.wait()
        return "nobody asks"
