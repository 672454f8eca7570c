"""Partial rollout: issue more than is needed and stop early (as APRIL does). Not on-policy in its selection.

The run ends when 1 / over_issue of the responses have finished; the others are written as "unfinished". Short
responses finish first, so what is kept is biased towards them: every line says `on_policy: false`. Failed ones do not
count; where too few can still finish, the run ends when none is open.
"""

from __future__ import annotations

import math

from seer_async.policies.no_context import NoContext


class Partial(NoContext):
    """Divided, FIFO, stopped early."""

    name = "partial"
    unbiased = False

    def enough(self, finished: int, total: int) -> bool:
        return finished >= math.ceil(total / self.config.over_issue)
