"""Random rollouts under random faults: each response comes out once, and exactly as one undivided call gives it.

Invariants and audit are checked after every event. `SEER_SEEDS=10000` runs more;
`python -m tests.core.scenario [lasting] SEED` repeats one.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from seer_async.errors import FailureKind

from .scenario import POLICIES, Lasting, Scenario, trace

if TYPE_CHECKING:
    from seer_async.testing import World

SEEDS = int(os.environ.get("SEER_SEEDS", "300"))
SECONDS_PER_SEED = 2  # on a machine that does much else
TRACED = range(20)

MUST_HAPPEN = [
    *FailureKind,
    *(f"Stop {reason}" for reason in ("done", "drained", "aborted", "no_engine")),
    *("stop", "length", "error", "unfinished"),
    *("stop string", "stop token", "forced end", "several engines", "marked", "preemption"),
    *("stale ChunkFinished", "stale ChunkFailed", "stale EngineReport"),
    *("reply of two versions", "empty reply", "restart", "crash"),
    *("EngineDown", "Cancel", "Woke", "Restored"),
]

MUST_HAPPEN_IN_SERVICES = [
    *("joined", "despair", "despair while others run", "abort", "restart", "marked", "several engines"),
    *("RequestsCancelled", "HandBackRequested", "HandBack", "Paused", "Resumed", "EngineHeld", "EngineDown"),
]


def tally(scenario: Scenario) -> Counter[str]:
    """What has happened in a finished run."""
    world: World = scenario.world
    seen = Counter(world.audit.seen)
    seen["crash"] = world.lives - sum(seen[key] for key in list(seen) if key.startswith("Stop "))
    seen["preemption"] = sum(engine.preemptions for engine in scenario.engines)
    for sample in world.samples.values():
        seen["several engines"] += len({chunk.engine for chunk in sample.chunks}) > 1
        seen["marked"] += world.core.policy.unbiased and not sample.on_policy
        seen["forced end"] += sample.stop_reason == "forced"
        seen["stop token"] += sample.stop_reason.isdigit()
        seen["stop string"] += sample.stop_reason in scenario.config.sampling.stop
    return seen


@pytest.mark.timeout(60 + SECONDS_PER_SEED * SEEDS)
def test_random_rollouts_under_random_faults() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        scenario = Scenario(seed)
        try:
            scenario.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        seen[scenario.config.scheduler.policy] += 1
        seen += tally(scenario)
    if SEEDS >= 300:
        assert [key for key in [*MUST_HAPPEN, *POLICIES] if not seen[key]] == []


@pytest.mark.timeout(60 + SECONDS_PER_SEED * SEEDS)
def test_random_services_under_random_faults() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS // 5):
        scenario = Lasting(seed)
        try:
            scenario.run()
        except Exception as error:
            raise AssertionError(f"lasting seed {seed}: {error}") from error
        seen += tally(scenario)
    if SEEDS >= 300:
        assert [key for key in MUST_HAPPEN_IN_SERVICES if not seen[key]] == []


# `oracle` in peace; `seer` under faults, with weight changes and stop strings
@pytest.mark.parametrize("seed", [14, 29])  # `seer` with stop strings and marks, and with restarts
def test_the_orchestrator_may_die_at_any_event(seed: int) -> None:
    whole = Scenario(seed)
    whole.run()
    for event in range(1, whole.world.events):
        scenario = Scenario(seed)
        scenario.world.crash(event)
        scenario.run()


def test_the_same_seed_gives_the_same_trace_in_any_process() -> None:
    here = [trace(seed) for seed in TRACED]
    assert len(set(here)) == len(here)
    for hash_seed in ("0", "1"):
        told = subprocess.run(
            [sys.executable, "-m", "tests.core.scenario", *map(str, TRACED)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        )
        assert told.stdout.split() == here
