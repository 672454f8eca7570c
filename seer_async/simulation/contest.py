"""Contenders side by side: the same work on the same engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from seer_async.policies import find_policy
from seer_async.simulation.contender import parse_contender, rival
from seer_async.simulation.run import Setup, Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seer_async.simulation.outcome import Figures


def contest(setup: Setup, contenders: Sequence[str]) -> Iterator[Figures]:
    """The figures of each contender, as soon as they are known; names are checked first.

    Raises:
        UsageError: A contender is not one.
    """
    parsed = [parse_contender(name) for name in contenders]
    return (Simulation(_over_issued(setup, contender.policy), contender).run() for contender in parsed)


def oracle_share(figures: Figures, all_figures: Sequence[Figures]) -> float | None:
    """Throughput as a share of that of the oracle of `rival`, if one has run and finished anything."""
    by_name = {other.contender: other for other in all_figures if other.workload == figures.workload}
    oracle = rival(parse_contender(figures.contender), map(parse_contender, by_name))
    best = by_name[oracle.name].throughput if oracle else 0.0
    return figures.throughput / best if best else None


def _over_issued(setup: Setup, policy: str) -> Setup:
    """A policy that stops early starts more: the workload twice, in the same proportions."""
    if find_policy(policy).unbiased:
        return setup
    return msgspec.structs.replace(
        setup, workload=setup.workload.twice(), scheduler={**setup.scheduler, "over_issue": 2.0}
    )
