"""Workloads for benchmarks: lengths as reasoning policies produce them, and what a finished run is judged by.

Lengths are heavy-tailed over groups and similar within a group: the logarithm of a length is the sum of a group's part
and a request's part, both normal. `correlation` is the group's share of the variance.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_TAIL = 0.9  # tail requests are the last tenth to finish


def heavy_tailed_lengths(
    groups: Sequence[str],
    n: int,
    *,
    mean: float,
    longest: int,
    sigma: float = 0.9,
    correlation: float = 0.75,
    seed: int,
) -> dict[str, int]:
    """A length in tokens for each request id, near `mean` on average and at most `longest`."""
    rng = random.Random(seed)  # noqa: S311 - a workload, not a secret
    middle = math.log(mean) - sigma**2 / 2
    lengths: dict[str, int] = {}
    for group in groups:
        shared = rng.gauss(0, sigma * math.sqrt(correlation))
        for index in range(n):
            own = rng.gauss(0, sigma * math.sqrt(1 - correlation))
            lengths[f"{group}/{index}"] = max(1, min(longest, round(math.exp(middle + shared + own))))
    return lengths


class _Timed(msgspec.Struct):
    finished: float


class _Written(msgspec.Struct):
    finish_reason: str
    timings: _Timed
    token_ids: list[int]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run in figures: seconds, tokens, tokens per second. `tail_s` as the paper defines tail time."""

    seconds: float
    tokens: int
    throughput: float
    tail_s: float


def outcome(samples: Path, started: float) -> Outcome:
    """Judge a samples.jsonl whose first call left at `started`, Unix seconds; only whole responses count."""
    with samples.open("rb") as file:
        written = [msgspec.json.decode(line, type=_Written) for line in file]
    whole = [sample for sample in written if sample.finish_reason not in {"unfinished", "error"}]
    return judged([s.timings.finished - started for s in whole], sum(len(s.token_ids) for s in whole))


def judged(times: Sequence[float], tokens: int) -> Outcome:
    """The outcome of responses that finished at `times`, seconds from the start, with so many tokens together."""
    seconds = max(times)
    return Outcome(seconds=seconds, tokens=tokens, throughput=tokens / seconds, tail_s=seconds - tail_start(times))


def tail_start(times: Iterable[float]) -> float:
    """When nine tenths of the requests had finished."""
    ordered = sorted(times)
    return ordered[math.ceil(_TAIL * len(ordered)) - 1]
