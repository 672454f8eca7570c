"""The key figures of a run: what one line of a comparison says.

Counters of retries, restarts, preemptions and drafts come from metrics.jsonl; everything else from the chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from seer_async.report.counters import increase

if TYPE_CHECKING:
    from seer_async.report.chunks import Chunks
    from seer_async.report.completion import Completion
    from seer_async.report.drafts import Drafts
    from seer_async.report.run import Run
    from seer_async.report.timeline import Timeline


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers. Times in seconds, shares in [0, 1]; the tail's are None until every sample has ended.

    `done` responses ended by themselves, `failed` with an error, `unfinished` are neither. `tokens` are all that were
    accepted and kept, `throughput` is tokens a second over `seconds`. `idle` is the mean over the engines.
    """

    samples: int
    done: int
    failed: int
    unfinished: int
    off_policy: int
    tokens: int
    seconds: float
    throughput: float
    tail_s: float | None
    tail_share: float | None
    idle: float
    chunks: int
    migrations: int
    retries: int
    restarts: int
    preemptions: int
    pooled_tokens: int
    cached_tokens: int
    drafted: int | None
    accepted: int | None
    acceptance_length: float | None


def figures(run: Run, end: Completion, fleet: Timeline, made: Chunks, drafting: Drafts | None) -> Figures:
    """The key figures of a run."""
    done = sum(response.complete for response in run.responses)
    failed = sum(response.finish_reason == "error" for response in run.responses)
    tokens = sum(response.tokens for response in run.responses)
    return Figures(
        samples=end.total,
        done=done,
        failed=failed,
        unfinished=end.total - done - failed,
        off_policy=sum(not response.on_policy for response in run.responses),
        tokens=tokens,
        seconds=end.seconds,
        throughput=tokens / end.seconds if end.seconds else 0.0,
        tail_s=end.tail_s,
        tail_share=end.tail_share,
        idle=fleet.idle,
        chunks=made.count,
        migrations=made.moved,
        retries=increase([0, *(reading.retries for reading in run.readings)]),
        restarts=increase([0, *(reading.restarts for reading in run.readings)]),
        preemptions=sum(engine.preemptions for engine in fleet.engines),
        pooled_tokens=made.pooled_tokens,
        cached_tokens=made.cached_tokens,
        drafted=drafting.drafted if drafting else None,
        accepted=drafting.accepted if drafting else None,
        acceptance_length=drafting.length if drafting else None,
    )
