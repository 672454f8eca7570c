"""What an engine computes again after preemptions, on its own /metrics: `seer:recomputed_tokens_total`.

vLLM counts a request's prefill once, when it is first admitted; a preempted one is admitted again, and computes all
that the caches have lost. The scheduler's statistics say of each such admission how many tokens it had and how many
were found, in the prefix cache or through a KV connector; the difference is counted here.
Invariant: an engine whose statistics do not say so has no such counter, instead of one that stays at 0.
"""

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import PrefixCacheStats

logger = init_logger("vllm.seer")


class Recomputation(AggregateStatLoggerBase):  # type: ignore[misc]  # vLLM is untyped here
    """One of the engine's stat loggers: sees the statistics of every step."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        recomputed(PrefixCacheStats(), None)  # an error here and not in a step, where it would end the engine
        self._tokens = Counter(
            "seer:recomputed_tokens", "Tokens that preempted requests computed again.", registry=registry
        )

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Count a step; `scheduler_stats` is None in one that has none."""
        if scheduler_stats is not None:
            self._tokens.inc(
                recomputed(scheduler_stats.prefix_cache_stats, scheduler_stats.connector_prefix_cache_stats)
            )

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


def recomputed(cache: Any, connector: Any) -> int:
    """Tokens computed by the requests of a step that had been preempted; `connector` is None without one."""
    found = cache.preempted_hits + (connector.preempted_hits if connector is not None else 0)
    return max(0, int(cache.preempted_queries - found))


def count_recomputation(client: Any) -> None:
    """Begin to count, if this is an engine that keeps statistics and caches prefixes: others do not tell."""
    manager = client.logger_manager if isinstance(client, AsyncLLM) else None
    if manager is None or not client.vllm_config.cache_config.enable_prefix_caching:
        return
    try:
        manager.stat_loggers.append(Recomputation())
    except Exception as error:  # noqa: BLE001 - the engine serves all the same
        logger.warning("Tokens computed again after preemptions are not counted: %s", error)
