"""Whole simulated rollouts: nothing lost, repeatable, within the bound, and fast."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from seer_async.events import Emit
from seer_async.simulation.calibration import Span, fit
from seer_async.simulation.contender import parse_contender
from seer_async.simulation.contest import contest, oracle_share
from seer_async.simulation.cost import EngineCost, EngineModel
from seer_async.simulation.outcome import Figures, lower_bound
from seer_async.simulation.presets import CPU, H100_SMALL, QWEN2_VL
from seer_async.simulation.run import Setup, Simulation
from seer_async.simulation.studies import scaled
from seer_async.simulation.workload import Shape, WorkGroup, Workload

CONTENDERS = [
    "group-round-robin",
    "group-round-robin+suffix",
    "streamrl",
    "no-context",
    "no-context+pool",
    "seer",
    "seer+pool",
    "seer+pool+grouped",
    "oracle+pool",
]
SMALL = scaled(QWEN2_VL, seed=1, scale=1 / 16)  # one engine, 600 responses


def cpu(seed: int = 0, **changes: Any) -> Setup:
    return msgspec.structs.replace(scaled(CPU, seed=seed), **changes)


def one(setup: Setup, contender: str) -> Figures:
    return next(contest(setup, [contender]))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("grain", [0, 1, 16])
def test_every_response_finishes_once_and_no_schedule_beats_the_bound(contender: str, grain: int) -> None:
    setup = cpu(grain=grain)
    simulation = Simulation(setup, parse_contender(contender))
    figures = simulation.run()
    wanted = {f"{group.id}/{i}": n for group in setup.workload.groups for i, n in enumerate(group.lengths)}
    assert simulation.finished.keys() == wanted.keys()
    assert figures.tokens == sum(-(-n // simulation.grain) * simulation.grain for n in wanted.values())
    assert 0 < figures.bound <= 1
    assert 0 <= figures.idle < 1
    assert 0 <= figures.tail_s <= figures.total_s


@pytest.mark.parametrize("contender", ["no-context", "seer+pool", "oracle+pool+grouped"])
def test_what_is_admitted_by_room_is_never_preempted(contender: str) -> None:
    assert one(cpu(), contender).preemptions == 0


def test_the_baseline_preempts_where_memory_is_scarce() -> None:
    scarce = one(cpu(), "group-round-robin")
    assert scarce.preemptions > 0
    assert scarce.again > 0
    ample = one(cpu(engine=EngineModel(cost=EngineCost(), kv_tokens=10**6)), "group-round-robin")
    assert ample.preemptions == ample.again == 0


def test_the_bound_is_reached_where_nothing_stands_in_the_way() -> None:
    work = Workload(name="w", limit=1000, groups=(WorkGroup(id="g", prompt=1, lengths=(1000,)),))
    engine = EngineModel(cost=EngineCost(prefill_token_s=0.0), kv_tokens=10_000)
    figures = one(Setup(workload=work, engine=engine, instances=1, chunk_size=0, grain=1), "seer")
    assert figures.total_s == pytest.approx(lower_bound([1000], 1, engine), rel=1e-6)


def test_what_no_engine_can_hold_is_counted_as_failed() -> None:
    for kv_tokens in (10, 100, 400):
        engine = msgspec.structs.replace(CPU.fleet.engine, kv_tokens=kv_tokens)
        figures = one(cpu(engine=engine), "oracle")
        assert figures.failed > 0
        assert figures.failed + figures.requests == 192
        assert (figures.throughput > 0) == (figures.requests > 0) == (kv_tokens > 10)
    assert one(cpu(), "oracle").failed == 0


def test_what_admission_relies_on_can_be_set() -> None:
    setup = scaled(H100_SMALL, seed=0)
    usual, careful = one(setup, "seer+pool"), one(msgspec.structs.replace(setup, admission={"stagger": 0}), "seer+pool")
    assert usual.preemptions == careful.preemptions == 0
    assert usual.batch > 1.2 * careful.batch


def test_a_pool_spares_the_second_prefill() -> None:
    without, pooled = one(cpu(), "seer"), one(cpu(), "seer+pool")
    assert without.again > 0
    assert without.loaded == 0
    assert pooled.again == 0
    assert pooled.loaded > 0
    assert pooled.throughput > without.throughput


def test_the_baseline_does_not_depend_on_the_chunk_size() -> None:
    small, large = (one(cpu(chunk_size=size, grain=1), "group-round-robin") for size in (32, 128))
    assert small.total_s == pytest.approx(large.total_s)


def test_foresight_shortens_the_tail() -> None:
    base, seer, oracle = contest(SMALL, ["group-round-robin", "seer+pool", "oracle+pool"])
    assert oracle.tail_s < seer.tail_s < base.tail_s
    assert base.throughput < seer.throughput < oracle.throughput
    assert oracle_share(seer, [base, seer, oracle]) == pytest.approx(seer.throughput / oracle.throughput)


def test_shares_are_of_the_oracle_with_a_pool_whether_or_not_a_contender_has_one() -> None:
    names = ["seer", "oracle", "seer+pool", "oracle+pool", "seer+pool+grouped"]
    seer, oracle, pooled, best, drafted = figures = list(contest(cpu(), names))
    shares = [oracle_share(f, figures) for f in figures]
    assert shares == [*(f.throughput / best.throughput for f in (seer, oracle, pooled, best)), None]
    assert oracle_share(seer, [seer, oracle]) == seer.throughput / oracle.throughput
    assert oracle_share(drafted, figures) is None  # no oracle drafts so


def test_partial_rollout_stops_at_half_of_twice_the_work() -> None:
    figures = one(cpu(), "partial")
    assert figures.requests >= 192
    assert figures.requests < 200


def test_the_same_seed_gives_the_same_figures_in_any_process() -> None:
    program = (
        "import msgspec; from tests.simulation.test_run import cpu, one;"
        "print(msgspec.structs.replace(one(cpu(), 'seer+pool+grouped'), wall_s=0.0))"
    )
    here = str(msgspec.structs.replace(one(cpu(), "seer+pool+grouped"), wall_s=0.0))
    for hash_seed in ("0", "1"):
        told = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        )
        assert told.stdout.strip() == here


def test_a_cost_is_found_again_in_a_run_on_it() -> None:
    cost = EngineCost(base_s=0.05, sequence_s=0.004, context_token_s=2e-6, prefill_token_s=0.002)
    shape = Shape(name="w", requests=160, n=8, mean=150, limit=512, prompt=40)
    setup = Setup(
        workload=shape.generate(0),
        engine=EngineModel(cost=cost, kv_tokens=4000),
        instances=2,
        chunk_size=64,
        grain=1,
    )
    found = fit(spans(setup))
    assert found.error < 0.05
    for name in ("base_s", "sequence_s", "prefill_token_s"):
        assert getattr(found.cost, name) == pytest.approx(getattr(cost, name), rel=0.15)


def spans(setup: Setup) -> list[list[Span]]:
    engines: dict[str, list[Span]] = {}

    class Recorded(Simulation):
        def _emitted(self, emit: Emit) -> None:
            super()._emitted(emit)
            prefix = len(emit.sample.prompt_token_ids)
            for chunk in emit.sample.chunks:
                computed = max(0, prefix - chunk.cached - chunk.pooled)
                engines.setdefault(chunk.engine, []).append(
                    Span(chunk.start, chunk.end, chunk.tokens, prefix, computed)
                )
                prefix += chunk.tokens

    Recorded(setup, parse_contender("seer")).run()
    return list(engines.values())


def test_a_fleet_of_256_is_simulated_at_a_fraction_of_a_millisecond_a_chunk() -> None:
    # So 100,000 requests, 240,000 chunks of 4,096 tokens, take less than two minutes: design/simulation.md has figures.
    shape = msgspec.structs.replace(QWEN2_VL.shape, requests=4_000)
    setup = Setup(workload=shape.generate(0), engine=QWEN2_VL.fleet.engine, instances=256, chunk_size=4096)
    figures = one(setup, "seer+pool")
    assert figures.wall_s / figures.chunks < 2e-3  # about 0.2 ms on an idle core: a bound against quadratic work


def test_what_more_knowledge_would_be_worth() -> None:
    names = [f"seer_async.simulation.knowing:{name}+pool" for name in ("Outlived", "FirstEnded", "Longest")]
    without, *told = figures = list(contest(SMALL, ["foresight+pool", *names]))
    assert {f.requests for f in figures} == {SMALL.workload.requests}
    assert len({f.total_s for f in figures}) == len(figures)
    assert told[-1].throughput > without.throughput
    assert told[-1].tail_s < 0.5 * without.tail_s
