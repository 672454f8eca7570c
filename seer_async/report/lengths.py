"""Lengths by group: how far a response's length follows from its prompt.

Only responses that ended by themselves count; a length that was cut off says little.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from seer_async.report.thin import thin_dots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.report.run import Run

_MOST_DOTS = 6000


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """One group: its finished responses, in tokens."""

    id: str
    responses: int
    shortest: int
    mean: float
    longest: int


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """All groups, from the shortest mean to the longest.

    `dots` are (rank of the group, length of one response); `mean`, `median`, `p90` and `longest` are over all
    responses, in tokens. `correlation` is the intra-class correlation of lengths and `log_correlation` that of their
    logarithms: 0 by chance, 1 where siblings are equally long, None where too little has finished to tell.
    """

    groups: list[Group]
    dots: list[tuple[int, int]]
    mean: float
    median: int
    p90: int
    longest: int
    correlation: float | None
    log_correlation: float | None


def lengths(run: Run) -> Lengths:
    """The lengths of a run."""
    by_group: dict[str, list[int]] = defaultdict(list)
    for response in run.responses:
        if response.complete:
            by_group[response.group].append(response.tokens)
    ranked = sorted(by_group.items(), key=lambda item: (_mean(item[1]), item[0]))
    every = sorted(length for own in by_group.values() for length in own)
    logs = {group: [math.log(max(1, length)) for length in own] for group, own in by_group.items()}
    return Lengths(
        groups=[
            Group(id=id_, responses=len(own), shortest=min(own), mean=_mean(own), longest=max(own))
            for id_, own in ranked
        ],
        dots=thin_dots([(rank, length) for rank, (_, own) in enumerate(ranked) for length in own], _MOST_DOTS),
        mean=_mean(every),
        median=quantile(every, 0.5),
        p90=quantile(every, 0.9),
        longest=every[-1] if every else 0,
        correlation=intraclass(by_group),
        log_correlation=intraclass(logs),
    )


def intraclass(by_group: Mapping[str, Sequence[float]]) -> float | None:
    """ICC(1) by one-way analysis of variance, for groups of any sizes; it can be slightly negative by chance."""
    groups = [own for own in by_group.values() if own]
    total = sum(len(own) for own in groups)
    if len(groups) < 2 or total <= len(groups):  # noqa: PLR2004 - nothing varies between fewer than two groups
        return None
    middle = sum(sum(own) for own in groups) / total
    between = sum(len(own) * (_mean(own) - middle) ** 2 for own in groups) / (len(groups) - 1)
    within = sum((x - _mean(own)) ** 2 for own in groups for x in own) / (total - len(groups))
    size = (total - sum(len(own) ** 2 for own in groups) / total) / (len(groups) - 1)
    spread = between + (size - 1) * within
    return (between - within) / spread if spread else None


def quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that `share` of an ascending sequence does not exceed; 0 of an empty one."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
