"""What a simulated run is judged by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.simulation.acceptance import Drafting
    from seer_async.simulation.cost import EngineModel


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times in seconds; `throughput` in finished tokens a second.

    `tail_s` is the time spent on the last tenth of the requests. `idle` is the share of engine time without a call.
    `again` are tokens that were computed a second time, because of a preemption or a move; `loaded` came from the pool.
    `requests` have finished; `failed` could not, because with their prompts they are longer than an engine's KV memory.
    `bound` is the share of a lower bound on the time: 1 means that no schedule on these engines could be faster.
    """

    contender: str
    workload: str
    throughput: float
    total_s: float
    tail_s: float
    idle: float
    batch: float
    preemptions: int
    migrations: int
    again: int
    loaded: int
    requests: int
    failed: int
    tokens: int
    chunks: int
    bound: float
    wall_s: float


def lower_bound(lengths: Sequence[int], instances: int, engine: EngineModel, drafting: Drafting | None = None) -> float:
    """Seconds that no schedule can beat: all work in the best batches on all engines, or the longest response alone.

    Every token costs its share of a step and the reading of its context. There are at least as many steps as the places
    in a batch ask for, and as many as memory asks for: summed over the steps, KV in use is what responses hold while
    they grow. Prompts and their prefill are left out. Without responses it is 0.
    """
    if not lengths:
        return 0.0
    ways = list(enumerate(drafting.best_gains)) if drafting else [(0, 1.0)]
    longest = [max(lengths)]
    seats, memory = float(engine.max_seqs), float(engine.kv_tokens)
    return max(
        min(_work_s(lengths, engine, way, seats=seats) for way in ways) / instances,
        min(_work_s(lengths, engine, way, memory=memory) for way in ways) / instances,
        min(_work_s(longest, engine, way, seats=1.0) for way in ways),
    )


def _work_s(
    lengths: Sequence[int],
    engine: EngineModel,
    way: tuple[int, float],
    *,
    seats: float = math.inf,
    memory: float = math.inf,
) -> float:
    """Engine seconds for responses drafted for with `way`, a depth and the tokens that a step then brings."""
    depth, gain = way
    tokens = sum(lengths) / gain
    context = sum(length * length for length in lengths) / 2 / gain
    cost = engine.cost
    steps = max(tokens / seats, context / memory)
    return (
        cost.base_s * steps + (cost.sequence_s + cost.draft_token_s * depth) * tokens + cost.context_token_s * context
    )
