"""Drafting engine by engine, and group by group: what was accepted, what it took, and how often it was switched off.

Engines count from their own start, so an engine's figures are what its counters gained during the run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from seer_async.report.draftgain import DraftGain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.report.elapsed import Elapsed
    from seer_async.report.run import Run
    from seer_async.types import DraftStats

LEAST = 20  # tokens drafted for a group or at a position, below which the share says nothing


class Drafter(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's drafting. Shares in [0, 1]; `acceptance[i]` is the share accepted of the tokens at position i.

    It ends where too few tokens were drafted to tell. `tokens_per_step` is what a step brought a request, with a draft
    or without. What only our own drafter counts is None or empty with others: the drafter's time as `step_ms`,
    milliseconds a step of the engine, and as `time_share` of the time in which it was watched; its steps, and those
    that were switched off.
    """

    name: str
    verified: int
    drafted: int
    accepted: int
    tokens_per_step: float
    acceptance: list[float]
    steps: int | None
    steps_off: int | None
    switch_offs: int | None
    step_ms: float | None
    time_share: float | None

    @property
    def off_share(self) -> float | None:
        """Share of the steps that were switched off."""
        return None if not self.steps or self.steps_off is None else self.steps_off / self.steps


class Accepted:
    """What follows from counts of drafts that were verified, of their tokens, and of those that were accepted."""

    __slots__ = ()
    verified: int
    drafted: int
    accepted: int

    @property
    def share(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def length(self) -> float:
        """Tokens that a verified draft brought on average, the bonus token included."""
        return 1 + self.accepted / self.verified if self.verified else 1.0


class GroupDrafts(Accepted, msgspec.Struct, frozen=True):
    """What drafts brought one group, over all engines."""

    id: str
    verified: int
    drafted: int
    accepted: int


def drafters(run: Run, elapsed: Elapsed) -> list[Drafter]:
    """The engines that drafted, by name."""
    seen: dict[str, list[tuple[float, DraftStats]]] = {}
    for reading in run.readings:
        for engine in reading.engines:
            if engine.drafts:
                seen.setdefault(engine.name, []).append((elapsed.at(reading.now), engine.drafts))
    return [_drafter(name, counts) for name, counts in seen.items() if len(counts) > 1]


def group_drafts(run: Run) -> list[GroupDrafts]:
    """The groups for which enough was drafted to tell, the best first."""
    found = [GroupDrafts(id_, *counts) for id_, counts in run.info.draft_groups.items()]
    return sorted((group for group in found if group.drafted >= LEAST), key=lambda group: (-group.share, group.id))


def _drafter(name: str, seen: Sequence[tuple[float, DraftStats]]) -> Drafter:
    gain = DraftGain()
    for (_, before), (_, now) in pairwise(seen):
        gain.add(before, now)
    watched = seen[-1][0] - seen[0][0]
    ours = gain.steps > 0
    return Drafter(
        name=name,
        verified=gain.verified,
        drafted=gain.drafted,
        accepted=gain.accepted,
        tokens_per_step=gain.generated / max(1, gain.generated - gain.accepted) if gain.generated else 1.0,
        acceptance=[
            right / all_ for all_, right in zip(gain.drafted_at, gain.accepted_at, strict=False) if all_ >= LEAST
        ],
        steps=gain.steps if ours else None,
        steps_off=gain.steps_off if ours else None,
        switch_offs=gain.switch_offs if ours else None,
        step_ms=1e3 * gain.drafter_s / gain.steps if ours else None,
        time_share=gain.drafter_s / watched if ours and watched else None,
    )
