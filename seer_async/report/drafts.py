"""Drafting over time: what share of drafted tokens the model agreed with, and how many tokens a step brought.

Engines count from their own start, so a run's share is what the counters gained during it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from seer_async.report.drafters import Accepted, Drafter, GroupDrafts, drafters, group_drafts
from seer_async.report.draftgain import DraftGain
from seer_async.report.thin import Point, thin_line

if TYPE_CHECKING:
    from seer_async.report.elapsed import Elapsed
    from seer_async.report.run import Run

_MOST_POINTS = 300
_LEAST_DRAFTED = 20  # tokens between two points; a share of fewer is noise


class Drafts(Accepted, msgspec.Struct, frozen=True, kw_only=True):
    """Drafting during a run: counts of drafts and tokens, and both rates over time as (seconds, value).

    `acceptance` is the share of drafted tokens that was accepted, `lengths` the tokens that a verified draft brought,
    the bonus token included. `groups` are those for which enough was drafted to tell, the best first.
    """

    verified: int
    drafted: int
    accepted: int
    generated: int
    acceptance: list[Point]
    lengths: list[Point]
    engines: list[Drafter]
    groups: list[GroupDrafts]


def drafts(run: Run, elapsed: Elapsed) -> Drafts | None:
    """The drafting of a run; None where no engine drafts."""
    seen = [(elapsed.at(reading.now), reading.drafts) for reading in run.readings if reading.drafts]
    if not seen:
        return None
    total = DraftGain()
    recent = DraftGain()
    acceptance: list[Point] = []
    lengths: list[Point] = []
    for (_, before), (time, now) in pairwise(seen):
        total.add(before, now)
        recent.add(before, now)
        if recent.drafted >= _LEAST_DRAFTED and recent.verified:
            acceptance.append((time, recent.accepted / recent.drafted))
            lengths.append((time, 1 + recent.accepted / recent.verified))
            recent = DraftGain()
    return Drafts(
        verified=total.verified,
        drafted=total.drafted,
        accepted=total.accepted,
        generated=total.generated,
        acceptance=thin_line(acceptance, _MOST_POINTS),
        lengths=thin_line(lengths, _MOST_POINTS),
        engines=drafters(run, elapsed),
        groups=group_drafts(run),
    )
