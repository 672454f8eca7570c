"""The counts of an engine that drafts, made up from what the mock has generated; it generates no faster for them.

Invariant: counts only grow, and those of the groups that were heard of last add up like the totals.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

DRAFT = 4  # tokens of every draft
MOST_GROUPS = 256  # as in the plug-in
_STEP_S = 0.0002  # of a drafter


class DraftCounts:
    """Drafts of `DRAFT` tokens in every step, each right with a chance of `acceptance` if those before it were.

    Groups differ: of each, by its name, the chance is between half of that and all of it.
    """

    def __init__(self, acceptance: float) -> None:
        self._acceptance = acceptance
        self.verified = 0
        self.drafted_at = [0] * DRAFT
        self.accepted_at = [0] * DRAFT
        self._groups: dict[str, list[int]] = {}  # drafts verified, tokens drafted, tokens accepted

    def add(self, group: str, tokens: int) -> None:
        """Count a request that generated `tokens`."""
        chance = self._acceptance * (1 - crc32(group.encode()) % 256 / 512)
        survival = [chance ** (position + 1) for position in range(DRAFT)]
        drafts = round(tokens / (1 + sum(survival)))
        accepted = [int(drafts * share) for share in survival]
        self.verified += drafts
        for position, count in enumerate(accepted):
            self.drafted_at[position] += drafts
            self.accepted_at[position] += count
        before = self._groups.pop(group, [0, 0, 0])
        self._groups[group] = [before[0] + drafts, before[1] + DRAFT * drafts, before[2] + sum(accepted)]
        if len(self._groups) > MOST_GROUPS:
            del self._groups[next(iter(self._groups))]

    def page(self) -> dict[str, Any]:
        """The counts, as `GET /v1/seer/drafts/stats` of an engine has them."""
        return {
            "steps": self.verified,
            "steps_off": 0,
            "switch_offs": 0,
            "draft_s": self.verified * _STEP_S,
            "verified": self.verified,
            "drafted": self.drafted_at,
            "accepted": self.accepted_at,
            "by_group": self._groups,
        }
