"""StreamRL with true lengths: groups dealt out longest first, and never moved (the paper's StreamRL-Oracle).

Each group goes, longest first, to the engine with the least work dealt to it so far; an engine's queue takes its
requests in that order, whole. What an oracle of lengths is worth without divided rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.policies.group_round_robin import GroupRoundRobin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.instance import Instance
    from seer_async.request import Group, Request


class StreamRL(GroupRoundRobin):
    """Undivided, a group to an engine, by true lengths."""

    name = "streamrl"
    needs_lengths = True

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self._load: dict[str, int] = {}  # tokens dealt to each engine

    def wait(self, request: Request) -> None:
        self._queue.push((-max(self._lengths_of(request.group)), request.group.order), request)

    def place(self, request: Request, tokens: int, instances: Sequence[Instance]) -> Instance | None:
        if request.group not in self._bound:
            least = min(instances, key=lambda instance: self._load.get(instance.name, 0))
            self._bound[request.group] = least.name
            self._load[least.name] = self._load.get(least.name, 0) + sum(self._lengths_of(request.group))
        return super().place(request, tokens, instances)

    def _lengths_of(self, group: Group) -> list[int]:
        return [self.lengths.get(request.id, group.limit) for request in group.requests]
