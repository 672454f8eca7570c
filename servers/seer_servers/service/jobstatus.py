"""What a rollout looks like now: from its spool, and while it runs from its open groups."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING

from seer_async.api import RolloutStatus, TailView

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_async.core import Core
    from seer_servers.service.jobfeed import Job
    from seer_servers.service.jobspool import Spool

_SHOWN_TAIL = 8


def status_of(spool: Spool, job: Job | None, core: Core) -> RolloutStatus:
    """The status; `job` is None once the rollout has ended. O(open responses)."""
    info = spool.info
    views = list(_open(job, core)) if job else []
    tokens = spool.tokens + sum(view.generated for view in views)
    seconds = max(1e-3, (info.ended or time.time()) - info.created)
    left = _tokens_left(spool, job, views) if job else 0
    return RolloutStatus(
        id=info.id,
        status=info.status,
        error=info.error,
        created=info.created,
        ended=info.ended,
        groups=info.groups,
        n=info.n,
        seed=info.seed,
        samples=info.groups * info.n,
        waiting=job.waiting if job else 0,
        open=job.open if job else 0,
        done=spool.done,
        failed=spool.failed,
        spooled=spool.count,
        groups_done=spool.whole_groups,
        tokens=tokens,
        tokens_per_s=round(tokens / seconds, 1),
        tokens_left=left,
        eta_s=_eta(job, views, left, tokens / seconds) if job else 0.0,
        bytes=spool.bytes,
        tail=heapq.nlargest(_SHOWN_TAIL, views, key=lambda view: view.left),
    )


def _open(job: Job, core: Core) -> Iterator[TailView]:
    """The open responses that the core has taken in."""
    for prompt, ticket in job.open_groups.values():
        for index, name in enumerate(ticket.requests):
            request = core.buffer.requests.get(name)
            if request is not None and index not in ticket.samples:
                left = max(1, core.context.estimate(request.group) - request.generated)
                state = str(request.state)
                yield TailView(id=f"{prompt.id}/{index}", state=state, generated=request.generated, left=left)


def _tokens_left(spool: Spool, job: Job, views: list[TailView]) -> int | None:
    """By the groups' estimates; a response that is not begun counts as the mean of those that have ended."""
    if not spool.done:
        return None
    mean = spool.tokens / spool.count
    return round(sum(view.left for view in views) + mean * job.waiting)


def _eta(job: Job, views: list[TailView], left: int | None, rate: float) -> float | None:
    """Seconds for all that is left at the rate so far, but not less than the longest one needs by itself.

    None while nothing has finished, and when whatever is open has outgrown its estimate.
    """
    if left is None or not rate or left <= len(views):
        return None
    pace = job.generating_s / max(1, job.spool.tokens)  # seconds a token of one response
    longest = max((view.left for view in views), default=0)
    return round(max(left / rate, longest * pace), 1)
