"""The service at one moment, as JSON, for the status page and for anyone who asks."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from seer_async.api import RUNNING, EngineRate, FleetStatus, Lengths
from seer_servers.service.meter import Meter
from seer_servers.service.part import Route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.api import RolloutStatus
    from seer_async.service import Service
    from seer_async.snapshot import GroupView
    from seer_servers.service.jobs import Jobs

_SHOWN_GROUPS = 48
_SHOWN_ROLLOUTS = 24
_FRESH_S = 0.5  # looking is O(open requests): many pages cost as much as one
_FIRST_EDGE, _BINS_PER_OCTAVE = 4, 4


class Status:
    """The part."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self._service = service
        self._jobs = jobs
        self._meter = Meter(service.core)
        self._body = b""
        self._made = -math.inf

    @property
    def routes(self) -> Sequence[Route]:
        """One."""
        return [
            Route(
                method="GET",
                path="/v1/status",
                handler=self._look,
                summary="Engines, groups, lengths, throughput and rollouts now",
                reply=FleetStatus,
            )
        ]

    async def start(self) -> None:
        """Begin to measure rates."""
        self._meter.start()

    async def stop(self) -> None:
        """End it."""
        await self._meter.stop()

    async def _look(self, _: web.Request) -> web.Response:
        if time.monotonic() - self._made > _FRESH_S:
            self._body, self._made = msgspec.json.encode(self.status()), time.monotonic()
        headers = {"Cache-Control": "no-store"}
        return web.Response(body=self._body, content_type="application/json", headers=headers)

    def status(self) -> FleetStatus:
        """Look now; O(open requests)."""
        service, rates = self._service, self._meter.engine_rates()
        snapshot = service.snapshot()
        groups = sorted(snapshot.groups, key=_by_length, reverse=True)
        rollouts = sorted(self._jobs.statuses(), key=_at_work, reverse=True)
        return FleetStatus(
            time=time.time(),
            started=self._meter.started,
            run=service.run_id,
            model=service.info.model,
            version=service.core.versions.current or "",
            paused=service.paused or None,
            max_requests=service.config.serve.max_requests,
            tokens_per_s=round(sum(rates.values()), 1),
            samples_per_s=self._meter.sample_rate(),
            engines=[
                EngineRate(name=view.name, url=service.client(view.name).url, tokens_per_s=rates.get(view.name, 0.0))
                for view in snapshot.engines
            ],
            lengths=lengths_of(service.lengths),
            history=self._meter.history(),
            snapshot=msgspec.structs.replace(snapshot, groups=groups[:_SHOWN_GROUPS]),
            groups_hidden=max(0, len(groups) - _SHOWN_GROUPS),
            rollouts=rollouts[:_SHOWN_ROLLOUTS],
            rollouts_hidden=max(0, len(rollouts) - _SHOWN_ROLLOUTS),
        )


def _by_length(view: GroupView) -> tuple[int, int]:
    return view.estimate, view.total - view.done


def _at_work(status: RolloutStatus) -> tuple[bool, float]:
    return status.status == RUNNING, status.created


def lengths_of(lengths: Sequence[int]) -> Lengths:
    """How lengths are distributed, in bins of a quarter octave: they are heavy-tailed."""
    if not lengths:
        return Lengths(count=0, edges=[], bins=[], median=0, p90=0, p99=0, longest=0)
    found = sorted(lengths)
    edges = _edges(found[0], found[-1])
    places = [bisect_right(found, edge - 1e-9) for edge in edges]
    return Lengths(
        count=len(found),
        edges=[round(edge, 2) for edge in edges],
        bins=[after - before for before, after in pairwise(places)],
        median=_quantile(found, 0.5),
        p90=_quantile(found, 0.9),
        p99=_quantile(found, 0.99),
        longest=found[-1],
    )


def _edges(shortest: int, longest: int) -> list[float]:
    """Edges around the lengths, always on the same grid; the shortest lengths share one bin."""
    steps = math.floor(_BINS_PER_OCTAVE * math.log2(max(longest, _FIRST_EDGE) / _FIRST_EDGE)) + 1
    grid = [0.0, *(_FIRST_EDGE * 2 ** (step / _BINS_PER_OCTAVE) for step in range(steps + 1))]
    first = bisect_right(grid, shortest) - 1
    return grid[first:]


def _quantile(found: Sequence[int], share: float) -> int:
    return found[min(len(found) - 1, math.ceil(share * len(found)) - 1)]
