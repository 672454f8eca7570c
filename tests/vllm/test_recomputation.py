"""What preempted requests compute again, counted from the statistics of vLLM's scheduler."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")

from prometheus_client import CollectorRegistry, generate_latest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from seer_async.telemetry import Metrics
from seer_servers.plugin import recomputation
from seer_servers.plugin.recomputation import Recomputation, count_recomputation


def stats(*admitted, connector=None):
    """A step in which these requests were admitted: (tokens, found, preempted before)."""

    def recorded(rows):
        cache = PrefixCacheStats()
        for tokens, found, preempted in rows:
            cache.record(tokens, found, preempted)
        return cache

    return SchedulerStats(
        prefix_cache_stats=recorded(admitted),
        connector_prefix_cache_stats=recorded(connector) if connector is not None else None,
    )


def told(registry):
    return Metrics(generate_latest(registry))._recomputed()


def test_only_what_preempted_requests_compute_counts():
    registry = CollectorRegistry()
    counter = Recomputation(registry)
    assert told(registry) == 0
    counter.record(stats((500, 0, False)), None, mm_cache_stats=None, engine_idx=0)
    counter.record(None, None)
    assert told(registry) == 0
    counter.record(stats((300, 64, True), (200, 32, False)), None)
    assert told(registry) == 236
    counter.record(stats((300, 64, True), connector=[(236, 128, True), (100, 50, False)]), None)
    assert told(registry) == 236 + 108


class Client(AsyncLLM):
    def __init__(self, *, caches):
        self.logger_manager = SimpleNamespace(stat_loggers=[])
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=caches))

    def __del__(self):
        """Nothing was started."""


def test_an_engine_that_does_not_tell_has_no_counter(monkeypatch):
    made = []
    monkeypatch.setattr(recomputation, "Recomputation", lambda: made.append("counter") or "counter")
    count_recomputation(Client(caches=False))
    count_recomputation(SimpleNamespace())
    assert made == []
    client = Client(caches=True)
    count_recomputation(client)
    assert client.logger_manager.stat_loggers == ["counter"]
    monkeypatch.setattr(recomputation, "Recomputation", lambda: PrefixCacheStats().gone)
    count_recomputation(Client(caches=True))  # statistics of another vLLM: said in the log, and the engine serves
