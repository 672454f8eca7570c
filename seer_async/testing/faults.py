"""Faults, drawn from a seed: what befalls engines at certain times, and what befalls single calls.

Nothing here acts. `World` and `Link` ask what is due and do it, so a schedule can also be written by hand.
"""

from __future__ import annotations

import random
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from seer_async.errors import FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class FaultKind(StrEnum):
    """What can befall an engine, or (the last four) the run."""

    KILL = "kill"  # its process dies, and another is started after `seconds`
    SLOW = "slow"  # every step takes `factor` times as long, for `seconds`
    PARTITION = "partition"  # no packet gets through for `seconds`
    LIE = "lie"  # its telemetry is made up, for `seconds`
    WEIGHTS = "weights"  # new weights are loaded, in all engines within `seconds`
    CRASH = "crash"  # the orchestrator dies in the middle of an event, and is resumed after `seconds`
    DRAIN = "drain"
    ABORT = "abort"


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, due at the virtual time `at`; `engine` is None for those of the run."""

    at: float
    kind: FaultKind
    engine: str | None = None
    seconds: float = 0.0
    factor: float = 1.0


class Mishap(StrEnum):
    """What can befall a call."""

    FAIL = "fail"  # refused at once, in any of the ways there are
    LOSE = "lose"  # the work is done and its reply lost
    ABORT = "abort"  # ended by the engine before its time: "abort"
    FALSE_STOP = "false_stop"  # ended by the engine at a stop string that is none
    LATE = "late"  # the reply takes seconds
    TWICE = "twice"  # the outcome is reported again, seconds later
    DEAF = "deaf"  # goes on, and is answered, after it was cancelled
    HANG = "hang"  # never answered


Odds = dict[Mishap, float]
"""The probability of each mishap for a call."""


class Faults:
    """A schedule. `timed` are the faults of engines and run; calls meet mishaps by `odds`, seeded."""

    def __init__(
        self, timed: Sequence[Fault] = (), odds: Mapping[Mishap, float] | None = None, *, seed: int = 0
    ) -> None:
        self.timed = sorted(timed, key=lambda fault: fault.at)
        self._odds = dict(odds or {})
        self._rng = random.Random(f"mishaps {seed}")  # noqa: S311 - a simulation must repeat itself

    def mishap(self) -> Mishap | None:
        """What befalls the next call, if anything does."""
        draw = self._rng.random()
        for mishap, probability in self._odds.items():
            draw -= probability
            if draw < 0:
                return mishap
        return None

    def failure(self) -> FailureKind:
        """How the next call that is to fail does."""
        return self._rng.choice(list(FailureKind))

    def calm(self) -> None:
        """Let nothing befall calls any more."""
        self._odds.clear()


def random_faults(
    seed: int, engines: Sequence[str], *, until: float, count: int, kinds: Sequence[FaultKind], odds: Odds
) -> Faults:
    """`count` faults of these kinds at random times before `until`, seconds."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - a simulation must repeat itself
    of_engine = {FaultKind.KILL, FaultKind.SLOW, FaultKind.PARTITION, FaultKind.LIE}
    timed = []
    for _ in range(count):
        kind = rng.choice(kinds)
        timed.append(
            Fault(
                at=rng.uniform(0, until),
                kind=kind,
                engine=rng.choice(engines) if kind in of_engine else None,
                seconds=rng.choice([0.0, 0.2, 1.0, 5.0]) * rng.uniform(0.5, 1.5),
                factor=rng.choice([2.0, 10.0, 50.0]),
            )
        )
    return Faults(timed, odds, seed=seed)
