"""Choosing an engine by KV room.

Invariant: only an engine with room for the whole chunk is chosen, so engines never preempt for us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.instance import Instance
    from seer_async.request import Request


def most_room(
    request: Request, tokens: int, instances: Sequence[Instance], affinity: float, pooled_affinity: float
) -> Instance | None:
    """The engine with the most free KV, or the one that ran the previous chunk while that costs no balance.

    Continuing on the request's last engine, whose prefix cache may still hold it, saves a prefill; it is preferred
    as long as its load would be at most (1 + affinity) times that of the emptiest engine. The comparison is relative,
    so requests spread out most eagerly in the tail, where a less loaded engine is faster and few are left to move.
    Between engines that share a KV pool a move costs a load instead of a prefill: there `pooled_affinity` holds.
    """
    best: Instance | None = None
    best_load = 0.0
    home: Instance | None = None
    home_load = 0.0
    least = tokens - request.group.prompt_len  # if it shares all of the prompt
    last = request.last_engine
    for instance in instances:
        if (
            best is not None
            and instance.name != last
            and instance.reserved * instance.block_size + least >= best_load * instance.room
        ):
            continue  # fuller than the best already; said early, because fleets are large
        need = instance.room_for(request, tokens)
        if need is None:
            continue
        load = (instance.reserved + need) / max(1, instance.capacity)
        if instance.name == last:
            home, home_load = instance, load
        if best is None or load < best_load:
            best, best_load = instance, load
    if home is not None and best is not None:
        margin = pooled_affinity if home.pool is not None and home.pool == best.pool else affinity
        if home_load <= best_load * (1 + margin):
            return home
    return best
