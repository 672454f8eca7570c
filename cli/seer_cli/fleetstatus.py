"""What is to be seen of a fleet from outside: health, load and pool of each engine, asked of the engines themselves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from rich.table import Table
from rich.text import Text

from seer_async.engine import EngineClient, engine_session
from seer_async.errors import EngineError
from seer_cli.panel import clean, duration, short

if TYPE_CHECKING:
    from seer_servers.fleetfile import Engine, FleetFile

_ANSWER_S = 5.0
_GIB = 1 << 30
_COUNTERS = ("loads", "saves")  # of the pool's, those with a column; blocks
_SOME_DOWN, _NONE_UP = 3, 4  # exit codes


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One engine now. `health` is "up" if it answers; else what its supervisor says of it, or "no answer".

    `kv_used` is a share of its KV cache; `pool` are the counters of GET /v1/seer/kv/stats.
    """

    name: str
    url: str
    health: str
    epoch: int | None
    uptime_s: float | None = None
    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None
    pool: dict[str, int] | None = None


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One fleet now. `running` is whether its supervisor lives, None for a fleet without one."""

    name: str
    running: bool | None
    host: str
    model: str
    kv_pool: str
    engines: list[EngineStatus]

    @property
    def exit_code(self) -> int:
        """0 if all engines are up, 3 if some are, 4 if none is or the fleet does not run."""
        up = sum(engine.health == "up" for engine in self.engines)
        if self.running is False or not up:
            return _NONE_UP
        return 0 if up == len(self.engines) else _SOME_DOWN


async def look(name: str, fleet: FleetFile, *, running: bool | None, api_key: str | None = None) -> FleetStatus:
    """Ask all engines of a fleet at once."""
    async with engine_session() as session:
        entries = enumerate(fleet.engines)
        engines = await asyncio.gather(*(_engine(i, each, session, api_key) for i, each in entries))
    return FleetStatus(
        name=name, running=running, host=fleet.host, model=fleet.model, kv_pool=fleet.kv_pool, engines=list(engines)
    )


async def _engine(index: int, entry: Engine, session: aiohttp.ClientSession, api_key: str | None) -> EngineStatus:
    status = EngineStatus(name=entry.name or f"engine-{index}", url=entry.url, health=_not_up(entry), epoch=entry.epoch)
    if not await _healthy(session, entry.url):
        return status
    client = EngineClient(entry.url, session, api_key=api_key)
    status = msgspec.structs.replace(status, health="up")
    with contextlib.suppress(EngineError, ValueError):  # healthy, but too busy to tell more
        stats = await client.stats(timeout_s=_ANSWER_S)
        status = msgspec.structs.replace(
            status,
            uptime_s=round(time.time() - float(stats.boot), 1),
            running=stats.running,
            waiting=stats.waiting,
            kv_used=round(stats.kv_used, 4),
        )
    with contextlib.suppress(EngineError):  # it has no pool, or no plug-in that could tell
        status = msgspec.structs.replace(status, pool=await client.pool_counters(timeout_s=_ANSWER_S))
    return status


def _not_up(entry: Engine) -> str:
    return entry.state if entry.state not in {"", "up"} else "no answer"


async def _healthy(session: aiohttp.ClientSession, url: str) -> bool:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
        async with session.get(
            f"{url.rstrip('/')}/health", timeout=aiohttp.ClientTimeout(total=_ANSWER_S), allow_redirects=False
        ) as reply:
            return reply.ok
    return False


# What a person sees of it


def table(status: FleetStatus) -> Table:
    """One line an engine, and the pool below."""
    shown = Table(
        title=_title(status),
        title_justify="left",
        caption=_pool(status),
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("engine")
    shown.add_column("URL", overflow="fold")
    shown.add_column("health")
    pooled = any(engine.pool for engine in status.engines)
    for column in ("epoch", "up for", "run", "wait", "KV", *(_COUNTERS if pooled else ())):
        shown.add_column(column, justify="right")
    for engine in status.engines:
        shown.add_row(*_cells(engine, pooled=pooled))
    return shown


def _title(status: FleetStatus) -> Text:
    words = [f"fleet {status.name}"]
    if status.running is False:
        words.append(f"does not run: its supervisor was killed; `seer fleet down {status.name}` clears it away")
    if status.model:
        words.append(status.model)
    return Text(clean(", ".join(words)), "bold")


def _cells(engine: EngineStatus, *, pooled: bool) -> list[Text]:
    def figure(value: float | None, shown: str) -> Text:
        return Text("-" if value is None else shown)

    cells = [
        Text(clean(engine.name)),
        Text(clean(engine.url)),
        Text(clean(engine.health), "green" if engine.health == "up" else "red"),
        figure(engine.epoch, str(engine.epoch)),
        figure(engine.uptime_s, duration(engine.uptime_s or 0)),
        figure(engine.running, str(engine.running)),
        figure(engine.waiting, str(engine.waiting)),
        figure(engine.kv_used, f"{engine.kv_used or 0:.0%}"),
    ]
    counters = engine.pool or {}
    names = _COUNTERS if pooled else ()
    return cells + [figure(counters.get(name), short(counters.get(name, 0))) for name in names]


def _pool(status: FleetStatus) -> Text | None:
    """The whole pool, as the first engine that knows it says."""
    pool = next((engine.pool for engine in status.engines if engine.pool and "bytes" in engine.pool), None)
    if pool is None:
        return None
    size, capacity = pool["bytes"] / _GIB, pool.get("capacity_bytes", 0) / _GIB
    kept = f"{short(pool.get('blocks', 0))} blocks, {size:.2f} of {capacity:.2f} GiB"
    failures = sum(engine.pool.get("failures", 0) for engine in status.engines if engine.pool)
    ends = f"{short(pool.get('evictions', 0))} evictions, {short(failures)} failed loads"
    return Text(clean(f"KV pool {status.kv_pool}: {kept}, {ends}"))
