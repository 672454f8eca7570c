"""What-if rules for a group's length estimate, in place of the Context Manager's own."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from seer_async.context import Context
from seer_async.errors import UsageError

if TYPE_CHECKING:
    from seer_async.request import Group, Request


class Mean(Context):
    """The mean of the finished responses, whatever the unfinished ones have reached."""

    def __init__(self) -> None:
        super().__init__()
        self._sum: Counter[Group] = Counter()
        self._count: Counter[Group] = Counter()

    def finish(self, request: Request) -> None:
        """See `Context`."""
        super().finish(request)
        self._sum[request.group] += request.generated
        self._count[request.group] += 1

    def estimate(self, group: Group) -> int:
        """See `Context`."""
        if not self.known(group):
            return group.limit
        return self._sum[group] // self._count[group]


class Optimistic(Context):
    """The longest seen, finished or not: a group without a finished response is as long as what it has generated."""

    def estimate(self, group: Group) -> int:
        """See `Context`."""
        return self._generated.get(group, 0)


RULES = {"longest": Context, "mean": Mean, "optimistic": Optimistic}


def find_estimate(name: str) -> Context:
    """A new Context Manager with the rule of that name.

    Raises:
        UsageError: There is none; lists the names.
    """
    if name not in RULES:
        raise UsageError(f"unknown estimate rule {name!r}; give one of {', '.join(RULES)}")
    return RULES[name]()
