"""What more knowledge would be worth: `foresight`, told true lengths as soon as a group has shown something.

What-if policies for the study `knowledge`. Each is a bound for every policy that starts and ranks as `foresight` does
and can learn of a length only from what it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.policies.foresight import Foresight, evidence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.request import Group, Request


class Outlived(Foresight):
    """Told a response's length when it has got as far as the longest of its siblings that have ended."""

    name = "knows-outlived"
    needs_lengths = True

    def _left(self, group: Group, requests: Sequence[Request]) -> list[float]:
        least = self._known_from(group)
        return [
            self.lengths[request.id] - request.generated if request.generated >= least else left
            for request, left in zip(requests, super()._left(group, requests), strict=True)
        ]

    def _known_from(self, group: Group) -> float:
        """Tokens that a response must have generated for its length to be known."""
        return max(evidence(group).ended, default=group.limit)


class FirstEnded(Outlived):
    """Told all lengths of a group when its first response has ended."""

    name = "knows-from-first"

    def _known_from(self, group: Group) -> float:
        return 0 if evidence(group).ended else group.limit


class Longest(Foresight):
    """Told from the start how long the longest response of each group is, and takes all of them to be as long."""

    name = "knows-groups"
    needs_lengths = True

    def _left(self, group: Group, requests: Sequence[Request]) -> list[float]:
        longest = max(self.lengths[request.id] for request in group.requests)
        return [float(longest - request.generated) for request in requests]
