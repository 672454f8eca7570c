"""The baseline that most trainers have: whole groups dealt out round-robin, requests sent undivided, engines queue.

A group is bound to one engine; it is bound anew only when that engine cannot take it any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.policies.no_context import NoContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.instance import Instance
    from seer_async.request import Group, Request


class GroupRoundRobin(NoContext):
    """Undivided, a group to an engine, queued there."""

    name = "group-round-robin"
    divided = False
    admits_by_room = False

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self._bound: dict[Group, str] = {}
        self._dealt = 0

    def forget(self, group: Group) -> None:
        self._bound.pop(group, None)

    def place(self, request: Request, tokens: int, instances: Sequence[Instance]) -> Instance | None:
        del tokens  # room is the engine's own business here
        by_name = {instance.name: instance for instance in instances}
        bound = by_name.get(self._bound.get(request.group, ""))
        if bound is None:
            bound = instances[self._dealt % len(instances)]
            self._dealt += 1
            self._bound[request.group] = bound.name
        return None if bound.half_open and bound.in_flight else bound
