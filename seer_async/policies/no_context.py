"""Divided rollout without context: first come, first served.

Requests go in the order of the dataset, also when they come back for their next chunk, as in an engine's own queue; an
engine is chosen by KV room. This is the paper's "divided rollout" alone, the ablation that shows what context adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.policies.base import Policy
from seer_async.policies.queues import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.request import Request


class NoContext(Policy):
    """Divided, FIFO."""

    name = "no-context"

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        super().__init__(config, context, lengths)
        self._queue = WaitingQueue()

    def wait(self, request: Request) -> None:
        self._queue.push(0, request)

    def leave(self, request: Request) -> None:
        pass

    def choose(self) -> Request | None:
        return self._queue.peek()
