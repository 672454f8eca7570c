"""Longest first with true lengths: the bound that no policy without foresight can be expected to beat.

The key is what a response still has to generate, so that among started requests the one that would end last goes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.policies.no_context import NoContext

if TYPE_CHECKING:
    from seer_async.request import Request


class Oracle(NoContext):
    """True lengths, longest remaining first."""

    name = "oracle"
    needs_lengths = True

    def wait(self, request: Request) -> None:
        length = self.lengths.get(request.id, request.group.limit)
        self._queue.push(request.generated - length, request)
