"""What every policy answers, and the placement most of them share.

Invariant: between `wait` and `leave` a request is a candidate of `choose`; `choose` only looks, it removes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from seer_async.errors import ConfigError
from seer_async.placement import most_room

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.config import SchedulerConfig
    from seer_async.context import Context
    from seer_async.instance import Instance
    from seer_async.request import Group, Request


class Policy:
    """Decides who goes next, and where.

    Attributes:
        divided: Whether responses are cut into chunks; if not, each is sent whole.
        admits_by_room: Whether a call is sent only where its KV bound fits; if not, engines queue.
        unbiased: Whether every started response is finished, so that the output is a fair sample of the policy.
        needs_lengths: Whether it must be given true lengths.
    """

    name: ClassVar[str]
    divided: ClassVar[bool] = True
    admits_by_room: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = False

    def __init__(self, config: SchedulerConfig, context: Context, lengths: Mapping[str, int] | None = None) -> None:
        if self.needs_lengths and not lengths:
            raise ConfigError(
                f"policy {self.name!r} needs true lengths: give scheduler.lengths a samples.jsonl of an earlier run"
            )
        self.config = config
        self.context = context
        self.lengths = lengths or {}

    def wait(self, request: Request) -> None:
        """The request entered the Request Buffer."""
        raise NotImplementedError

    def leave(self, request: Request) -> None:
        """The request left it: dispatched, finished or parked."""
        raise NotImplementedError

    def choose(self) -> Request | None:
        """The request that should go next."""
        raise NotImplementedError

    def learned(self, request: Request) -> None:
        """The group's estimate may have moved because of this request's new tokens."""

    def forget(self, group: Group) -> None:
        """The group has ended for good; a policy that remembers groups drops this one."""

    def place(self, request: Request, tokens: int, instances: Sequence[Instance]) -> Instance | None:
        """Which of the engines that may take it gets the request; None when it should wait.

        `tokens` is the chunk's KV bound: the longest sequence it can end with.
        """
        return most_room(request, tokens, instances, self.config.affinity, self.config.pooled_affinity)

    def is_probe(self, request: Request) -> bool:
        """Whether the request runs ahead of its group to reveal its length."""
        del request
        return False

    def enough(self, finished: int, total: int) -> bool:
        """Whether the run may end with `finished` of `total` responses; it does when none is open in any case.

        Those that failed have not finished.
        """
        return finished == total
