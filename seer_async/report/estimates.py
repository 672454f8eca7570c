"""What the context said of a request's length when it was dispatched, against what it turned out to be.

The rule is that of `seer_async.context`, replayed from the chunks' times, whatever policy ran: without a finished
sibling the estimate is the limit, with one the longest finished or generated so far in the group.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from seer_async.report.lengths import quantile
from seer_async.report.thin import thin_dots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from seer_async.report.run import Response, Run

_MOST_DOTS = 4000


class Estimates(msgspec.Struct, frozen=True, kw_only=True):
    """Dispatches of responses whose length is known by now.

    `informed` of them came after a sibling had finished; the others were made at the limit. Of the informed: the median
    and the 90th percentile of the absolute error in tokens, the median of estimate / length, and the share that was
    estimated too short. `dots` are (length, estimate) of informed dispatches.
    """

    dispatches: int
    informed: int
    limit: int
    median_error: int
    p90_error: int
    median_ratio: float
    too_short: float
    dots: list[tuple[int, int]]


class Estimate(NamedTuple):
    """One dispatch: the request's true length and what was estimated, in tokens; `known` if a sibling had finished."""

    length: int
    estimate: int
    known: bool


def estimates(run: Run) -> Estimates:
    """The estimates of a run."""
    by_group: dict[str, list[Response]] = defaultdict(list)
    for response in run.responses:
        by_group[response.group].append(response)
    made = [one for own in by_group.values() for one in replay(own, limit_of(run, own[0].prompt_tokens))]
    known = [(one.length, one.estimate) for one in made if one.known]
    errors = sorted(abs(estimate - length) for length, estimate in known)
    ratios = sorted(estimate / max(1, length) for length, estimate in known)
    return Estimates(
        dispatches=len(made),
        informed=len(known),
        limit=limit_of(run, 0),
        median_error=quantile(errors, 0.5),
        p90_error=quantile(errors, 0.9),
        median_ratio=ratios[(len(ratios) - 1) // 2] if ratios else 0.0,
        too_short=sum(estimate < length for length, estimate in known) / max(1, len(known)),
        dots=thin_dots(sorted(known), _MOST_DOTS),
    )


def limit_of(run: Run, prompt_tokens: int) -> int:
    """The most tokens a response may have: as configured, and as far as the engines' context reaches."""
    room = [int(engine["max_model_len"]) - prompt_tokens for engine in run.engine_infos]
    return min([int(run.setting("sampling", "max_tokens") or 0), *room])


def replay(group: Sequence[Response], limit: int) -> Iterable[Estimate]:
    """The estimate at each dispatch of a group's responses; replies come before the dispatches they lead to."""
    events = sorted(
        (time, kind, index, n)
        for index, response in enumerate(group)
        for n, chunk in enumerate(response.chunks)
        for time, kind in ((chunk.end, 0), (chunk.start, 1))
    )
    generated = [0] * len(group)
    finished = longest = 0
    for _, kind, index, n in events:
        response = group[index]
        if kind == 0:
            generated[index] += response.chunks[n].tokens
            longest = max(longest, generated[index])
            if response.complete and n == len(response.chunks) - 1:
                finished = max(finished, generated[index])
        elif response.complete:
            yield Estimate(response.tokens, max(finished, longest) if finished else limit, bool(finished))
