"""The engine with closed-form progress against the test kit's engine, and against a loop over steps."""

import random
from functools import partial
from typing import Any

import pytest

from seer_async.simulation.acceptance import Drafting
from seer_async.simulation.cost import EngineCost, EngineModel
from seer_async.simulation.engine import Call, FastEngine
from seer_async.testing import Model, SimulatedEngine, VirtualClock, Work
from seer_async.types import EngineInfo

BLOCK = 16


def jobs(seed: int, count: int = 40) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    prompts = {f"g{g}": rng.randint(2, 60) for g in range(6)}
    calls = []
    for number in range(count):
        group = rng.choice(list(prompts))
        prefix = prompts[group] + rng.choice([0, rng.randint(1, 60)])
        calls.append(
            {"at": rng.choice([0.0, rng.uniform(0, 2)]), "group": group, "prompt": prompts[group], "prefix": prefix}
            | {"amount": rng.randint(1, 120), "number": number}
        )
    return calls


def fast(calls: list[dict[str, Any]], model: EngineModel, **options: Any) -> tuple[dict[int, float], FastEngine]:
    clock = VirtualClock()
    ended: dict[int, float] = {}
    engine = FastEngine("e", model, clock, lambda done: ended.update((c.id, clock.now) for c in done), **options)

    def arrive(job: dict[str, Any]) -> None:
        engine.submit(
            Call(
                job["number"],
                f"r{job['number']}",
                job["group"],
                prompt=job["prompt"],
                prefix=job["prefix"],
                amount=job["amount"],
            )
        )
        engine.plan()

    for job in calls:
        clock.after(job["at"], partial(arrive, job))
    while clock.step():
        assert engine.used <= model.kv_tokens + 1e-3
    assert engine.running == engine.queued == 0
    return ended, engine


def kit(calls: list[dict[str, Any]], model: EngineModel) -> tuple[dict[int, float], SimulatedEngine]:
    clock = VirtualClock()
    info = EngineInfo(
        boot="", model="m", max_model_len=10**6, block_size=BLOCK, num_blocks=model.kv_tokens // BLOCK + 1,
        max_num_seqs=model.max_seqs, shares_prefixes=True,
    )  # fmt: skip
    engine = SimulatedEngine("e", info, clock, Model(), model.cost)
    engine.start()
    ended: dict[int, float] = {}

    def arrive(job: dict[str, Any]) -> None:
        prompt = [1 + int(job["group"][1:])] * job["prompt"]
        rest = [1000 + job["number"]] * (job["prefix"] - job["prompt"])
        params = {"max_tokens": job["amount"], "ignore_eos": True, "seed": job["number"], "logprobs": 0}
        params["extra_args"] = {"seer_prompt_len": job["prompt"]}
        done = lambda _: ended.update([(job["number"], clock.now)])  # noqa: E731
        assert engine.submit(Work(str(job["number"]), prompt + rest, params, done)) is None

    for job in calls:
        clock.after(job["at"], partial(arrive, job))
    while clock.step():
        pass
    return ended, engine


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("kv_tokens", "max_seqs"), [(100_000, 1024), (100_000, 7), (800, 1024)])
def test_it_agrees_with_the_kit(seed: int, kv_tokens: int, max_seqs: int) -> None:
    model = EngineModel(cost=EngineCost(), kv_tokens=kv_tokens, max_seqs=max_seqs)
    calls = jobs(seed)
    mine, engine = fast(calls, model, shared_prompt=lambda prompt: (prompt - 1) // BLOCK * BLOCK)
    theirs, other = kit(calls, model)
    assert mine == pytest.approx(theirs, abs=1e-6)
    assert engine.preemptions == other.preemptions
    assert engine.prefilled == other.prompted - other.cached
    assert (engine.preemptions > 0) == (kv_tokens < 1000)


def test_a_growing_context_costs_what_a_loop_over_steps_says() -> None:
    cost = EngineCost(base_s=0.01, sequence_s=0.001, context_token_s=1e-5, prefill_token_s=0.0)
    amounts = {0: 700, 1: 400, 2: 100}
    calls = [
        {"at": 0.0, "group": f"g{n}", "prompt": 10, "prefix": 50, "amount": amounts[n], "number": n} for n in amounts
    ]
    ended, _ = fast(calls, EngineModel(cost=cost, kv_tokens=10**6))
    now, expected = 0.0, {}
    for step in range(700):
        running = [n for n, amount in amounts.items() if amount > step]
        now += cost.step_s(len(running), len(running) * (50 + step))
        expected.update((n, now) for n in running if amounts[n] == step + 1)
    assert ended == pytest.approx(expected, rel=2e-3)


def test_drafts_bring_what_the_table_says() -> None:
    cost = EngineCost(base_s=0.01, sequence_s=0.0, draft_token_s=0.0, prefill_token_s=0.0)
    drafting = Drafting.from_table(grouped=True)
    calls = [{"at": 0.0, "group": "g", "prompt": 10, "prefix": 10, "amount": 1000, "number": 0}]
    for references, length in ((0, 1.70), (1, 2.04), (15, 2.53)):
        ended, _ = fast(
            calls, EngineModel(cost=cost, kv_tokens=10**6), drafting=drafting, references=lambda _, r=references: r
        )
        assert ended[0] == pytest.approx(0.01 * 1000 / length, rel=2e-2)  # eight positions, not all


def test_one_more_draft_would_not_pay() -> None:
    drafting = Drafting.from_table(grouped=True)
    cost = EngineCost(base_s=0.02, sequence_s=0.0005, draft_token_s=0.0005)
    for counts in ([1, 0, 0, 0, 0], [20, 3, 0, 5, 9], [200, 0, 0, 0, 200]):
        plain = cost.stretch(sum(counts), 0, 0, 0).fixed
        best = drafting.depths(counts, cost, plain)
        chosen = rate(drafting, counts, best, cost, plain)
        for level, count in enumerate(counts):
            for change in (-1, 1):
                other = list(best)
                other[level] += change
                if count and 0 <= other[level] <= 8:
                    assert rate(drafting, counts, other, cost, plain) <= chosen * (1 + 1e-9)


def rate(drafting: Drafting, counts: list[int], depths: Any, cost: EngineCost, plain: float) -> float:
    tokens = sum(n * drafting.gain(level, d) for level, (n, d) in enumerate(zip(counts, depths, strict=True)))
    return tokens / (plain + cost.draft_token_s * sum(n * d for n, d in zip(counts, depths, strict=True)))
