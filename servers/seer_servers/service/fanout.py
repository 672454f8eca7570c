"""One control call to many engines at once.

Invariants: every call has a deadline; an engine that fails is named with its URL in what the caller is told, and so is
what that means for the others. Engines that answer nothing at all are passed over: they hold no work, and whatever they
miss keeps them from sampling when they come back.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.errors import EngineError, FailureKind
from seer_servers.service.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from seer_async.service import Service

REACH_S = 2.0
"""To see whether an engine that is not in use answers at all."""
ASK_S = 10.0
"""For questions that an engine answers from memory."""


class Outcome:
    """What became of one call to each of several engines, by name, in the fleet's order."""

    def __init__(self) -> None:
        self.ok: dict[str, bytes] = {}
        self.failed: dict[str, EngineError] = {}

    def decoded(self, kind: Any) -> dict[str, Any]:
        """The good answers as `kind`; those that are not become failures."""
        answers: dict[str, Any] = {}
        for name, answer in list(self.ok.items()):
            try:
                answers[name] = msgspec.json.decode(answer, type=kind)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                del self.ok[name]
                self.failed[name] = EngineError(FailureKind.BAD_REPLY, f"answers something else than vLLM: {error}")
        return answers


class Fanout:
    """Calls to the engines of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def live(self) -> list[str]:
        """Engines that answer now, in the fleet's order.

        Raises:
            ApiError: None does.
        """
        instances = self._service.core.instances
        others = [name for name in self._service.fleet.clients if not instances[name].up]
        reached = await self.get("/health", others, timeout_s=REACH_S)
        live = [name for name in self._service.fleet.clients if name not in others or name in reached.ok]
        if not live:
            raise ApiError(503, f"no engine answers: {self.explain(reached.failed)}", retry_after=REACH_S)
        return live

    async def get(self, path: str, engines: Iterable[str], *, timeout_s: float = ASK_S) -> Outcome:
        """Ask engines the same."""
        return await self._all("GET", path, dict.fromkeys(engines), timeout_s)

    async def post(
        self, path: str, engines: Iterable[str], body: bytes | None = None, *, timeout_s: float = ASK_S
    ) -> Outcome:
        """Tell engines the same."""
        return await self._all("POST", path, dict.fromkeys(engines, body), timeout_s)

    async def _all(self, method: str, path: str, bodies: Mapping[str, bytes | None], timeout_s: float) -> Outcome:
        calls = [self._one(method, path, name, body, timeout_s) for name, body in bodies.items()]
        return gathered(list(bodies), await asyncio.gather(*calls))

    def begin(
        self, path: str, bodies: Mapping[str, bytes], *, timeout_s: float
    ) -> dict[str, asyncio.Task[bytes | EngineError]]:
        """Tell each engine its own, at the same time; the calls go on by themselves."""
        return {
            name: asyncio.create_task(self._one("POST", path, name, body, timeout_s)) for name, body in bodies.items()
        }

    async def _one(
        self, method: str, path: str, name: str, body: bytes | None, timeout_s: float
    ) -> bytes | EngineError:
        client = self._service.fleet.clients.get(name)
        if client is None:
            return EngineError(FailureKind.CONNECTION, "it has been removed from the fleet")
        try:
            return await client.control(method, path, body, timeout_s=timeout_s)
        except EngineError as error:
            return error

    # What is said of failures

    def check(self, outcome: Outcome, others: str, *, repeatable: bool = True) -> None:
        """Raise ApiError if an engine failed: with what all that failed answered, if it is the caller's fault.

        Otherwise 502, or 424 if the call must not be repeated as it is: trainers repeat after a 502.
        """
        if not outcome.failed:
            return
        statuses = {error.status for error in outcome.failed.values()}
        refused = statuses.pop() if len(statuses) == 1 else 0
        status = refused if 400 <= refused < 500 else 502 if repeatable else 424  # noqa: PLR2004 - HTTP
        said = self.explain(outcome.failed)
        raise ApiError(status, f"{said}; {others}" if outcome.ok and others else said)

    def explain(self, failed: Mapping[str, EngineError]) -> str:
        """Which engines failed, and how."""
        return "; ".join(f"{self.title(name)}: {error}" for name, error in failed.items())

    def title(self, name: str) -> str:
        """An engine as users see it."""
        client = self._service.fleet.clients.get(name)
        return f"{name} ({client.url})" if client else name


def gathered(names: Sequence[str], answers: Iterable[bytes | EngineError]) -> Outcome:
    """Sort answers into good ones and failures."""
    outcome = Outcome()
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, EngineError):
            outcome.failed[name] = answer
        else:
            outcome.ok[name] = answer
    return outcome
