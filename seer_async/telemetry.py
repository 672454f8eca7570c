"""Reading an engine's /metrics: the few Prometheus series that decisions rest on.

Invariant: a reading is complete or an error; a missing series is an error that names it, because a server without these
series is not a vLLM server that can be scheduled.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from seer_async.errors import EngineError, FailureKind
from seer_async.types import DraftStats, EngineStats, PoolStats

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE = re.compile(  # not draft_group_...: those are for dashboards, and draftgroups.py asks elsewhere
    rb"^(vllm:\w+|seer:(?!draft_group_)\w+|process_start_time_seconds)(?:\{(.*)\})? (\S+)$", re.MULTILINE
)
_LABEL = re.compile(rb'(\w+)="([^"]*)"')
_POSITION = re.compile(rb'position="(\d{1,2})"')
_POSITIONS = 64  # of a draft; see config.FleetConfig.draft_tokens


class Metrics:
    """One parsed /metrics page: sums over engines of a server, and the labels of its cache_config_info."""

    def __init__(self, page: bytes) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._positions: dict[str, dict[int, float]] = {}
        self.cache: dict[str, str] = {}
        for name, labels, value in self._series(page):
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
            if name.startswith("seer:draft_tokens_") and (position := _POSITION.search(labels)):
                at = self._positions.setdefault(name, {})
                at[int(position[1])] = at.get(int(position[1]), 0.0) + value
            if name == "vllm:cache_config_info":
                self.cache = {k.decode(): v.decode(errors="replace") for k, v in _LABEL.findall(labels)}

    @staticmethod
    def _series(page: bytes) -> Iterator[tuple[str, bytes, float]]:
        for name, labels, value in _LINE.findall(page):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                yield name.decode(), labels, number

    def total(self, name: str, default: float | None = None) -> float:
        """Sum of a series over the server's engines."""
        if name in self._sums:
            return self._sums[name]
        if default is None:
            raise EngineError(
                FailureKind.BAD_REPLY, f"/metrics has no {name}: its metrics are off, or it is no vLLM server"
            )
        return default

    def mean(self, name: str) -> float:
        """Mean of a series over the server's engines."""
        return self.total(name) / self._counts[name]

    def by_position(self, name: str) -> list[int]:
        """A counter with a position label, from position 0 to the last one that it knows."""
        found = self._positions.get(name, {})
        return [int(found.get(position, 0.0)) for position in range(min(_POSITIONS, max(found, default=-1) + 1))]

    @property
    def boot(self) -> str:
        """Identity of the server process: when it started."""
        return repr(self.total("process_start_time_seconds"))

    @property
    def process(self) -> str:
        """What no other server has: when it made its first counters, in microseconds; empty where it does not say.

        When it started is no such name: engines of many hosts start within the same hundredth of a second.
        """
        created = self._sums.get("vllm:num_preemptions_created")
        return f"{self.boot}/{created!r}" if created is not None else ""

    def cache_int(self, name: str) -> int:
        """An integer label of cache_config_info."""
        try:
            return int(self.cache[name])
        except (KeyError, ValueError):
            raise EngineError(FailureKind.BAD_REPLY, f"/metrics says nothing usable about {name}") from None

    @property
    def shares_prefixes(self) -> bool:
        """Whether the engine caches prefixes, so that sequences which begin alike share blocks."""
        return self.cache.get("enable_prefix_caching") == "True"

    def stats(self, *, boot: str, weight_version: str | None) -> EngineStats:
        """The reading the core works with."""
        pooled = self.total("vllm:external_prefix_cache_hits_total", 0.0)
        local = self.total("vllm:prefix_cache_hits_total", 0.0)
        return EngineStats(
            boot=boot,
            running=int(self.total("vllm:num_requests_running")),
            waiting=int(self.total("vllm:num_requests_waiting")),
            kv_used=min(1.0, max(0.0, self.mean("vllm:kv_cache_usage_perc"))),
            preemptions=int(self.total("vllm:num_preemptions_total", 0.0)),
            generated_tokens=int(self.total("vllm:generation_tokens_total", 0.0)),
            prompt_tokens=int(self.total("vllm:prompt_tokens_total", 0.0)),
            cached_tokens=int(self.total("vllm:prompt_tokens_cached_total", local + pooled) - pooled),
            pooled_tokens=int(pooled),
            recomputed_tokens=self._recomputed(),
            weight_version=weight_version,
            pool=self._pool(),
            drafts=self._drafts(),
        )

    def _recomputed(self) -> int | None:
        name = "seer:recomputed_tokens_total"
        return int(self.total(name)) if name in self._sums else None

    def _drafts(self) -> DraftStats | None:
        if "vllm:spec_decode_num_drafts_total" not in self._sums:
            return None
        return DraftStats(
            verified=int(self.total("vllm:spec_decode_num_drafts_total")),
            drafted=int(self.total("vllm:spec_decode_num_draft_tokens_total", 0.0)),
            accepted=int(self.total("vllm:spec_decode_num_accepted_tokens_total", 0.0)),
            generated=int(self.total("vllm:generation_tokens_total", 0.0)),
            steps=int(self.total("seer:draft_steps_total", 0.0)),
            steps_off=int(self.total("seer:draft_steps_off_total", 0.0)),
            switch_offs=int(self.total("seer:draft_switch_offs_total", 0.0)),
            drafter_s=self.total("seer:draft_draft_s_total", 0.0),
            drafted_at=self.by_position("seer:draft_tokens_drafted_total"),
            accepted_at=self.by_position("seer:draft_tokens_accepted_total"),
        )

    def _pool(self) -> PoolStats | None:
        if "seer:kv_pool_bytes" not in self._sums:
            return None
        return PoolStats(
            blocks=self._pool_int("blocks"),
            bytes=self._pool_int("bytes"),
            capacity_bytes=self._pool_int("capacity_bytes"),
            evictions=self._pool_int("evictions_total"),
            loads=self._pool_int("loads_total"),
            saves=self._pool_int("saves_total"),
            failures=self._pool_int("failures_total"),
            refused=self._pool_int("refused_total"),
        )

    def _pool_int(self, name: str) -> int:
        return int(self.total(f"seer:kv_pool_{name}", 0.0))
