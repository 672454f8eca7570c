"""What a decision costs with 10,000 requests waiting; `python -m tests.core.test_decision_cost` prints it."""

import random
import time
from typing import NamedTuple

import pytest

from seer_async.config import resolve
from seer_async.core import Core
from seer_async.events import ChunkFinished, Dispatch, EngineUp, GroupAdded
from seer_async.policies import policy_names
from seer_async.request import State
from seer_async.types import ChunkReply, EngineInfo, Prompt
from seer_cli.process import calm_gc

ENGINES = 64
SEATS = 64
WAITING = 10_000
GROUP = 8
CHUNK = 64
FAR_TOO_LONG_US = 5_000  # a hundred times what it takes: a bound against quadratic work, not against slow machines


class Cost(NamedTuple):
    """Microseconds of CPU that `handle` takes for a `ChunkFinished` and the `Dispatch` that follows it."""

    p50: float
    p99: float
    worst: float


def loaded_core(policy: str, rng: random.Random) -> tuple[Core, list[Dispatch]]:
    """All seats are taken, and `WAITING` requests wait."""
    names = [f"e{n}" for n in range(ENGINES)]
    groups = range((WAITING + ENGINES * SEATS) // GROUP + 1)
    lengths = {f"g{g}/{n}": rng.randint(1, 4000) for g in groups for n in range(GROUP)}
    config = resolve({"rollout": {"chunk_size": CHUNK}, "scheduler": {"policy": policy}})
    core = Core(config, names, run="r", seed=0, lengths=lengths)
    for g in groups:
        core.handle(GroupAdded(prompt=Prompt(id=f"g{g}", token_ids=[g] * 60), n=GROUP, limit=4096), 0.0)
    sent: list[Dispatch] = []
    for name in names:
        info = EngineInfo(
            boot=name, model="m", max_model_len=8192, block_size=16, num_blocks=SEATS * 300, max_num_seqs=SEATS
        )
        sent += [c for c in core.handle(EngineUp(engine=name, info=info), 0.0) if isinstance(c, Dispatch)]
    return core, sent


def measure(policy: str, decisions: int) -> Cost:
    """Answer random calls, one response in sixty ending, and time each answer."""
    rng = random.Random(0)
    core, sent = loaded_core(policy, rng)
    calm_gc()
    spent: list[float] = []
    for now in range(decisions):
        place = rng.randrange(len(sent))
        count = min(CHUNK, sent[place].max_tokens)
        finish = "stop" if rng.random() < 1 / 60 else "length"
        reply = ChunkReply(token_ids=[7] * count, logprobs=[-1.0] * count, finish_reason=finish)
        event = ChunkFinished(call=sent[place].call, reply=reply)
        begun = time.thread_time_ns()
        commands = core.handle(event, float(now))
        spent.append((time.thread_time_ns() - begun) / 1000)
        sent[place : place + 1] = [command for command in commands if isinstance(command, Dispatch)]
    spent.sort()
    return Cost(spent[len(spent) // 2], spent[len(spent) * 99 // 100], spent[-1])


@pytest.mark.parametrize("policy", sorted(set(policy_names()) - {"group-round-robin", "streamrl"}))
def test_a_decision_stays_cheap(policy: str) -> None:
    assert measure(policy, 1000).p50 < FAR_TOO_LONG_US


def test_that_many_requests_really_wait() -> None:
    core, sent = loaded_core("seer", random.Random(0))
    assert len(sent) == ENGINES * SEATS
    assert core.buffer.counts[State.WAITING] >= WAITING


if __name__ == "__main__":
    for policy in policy_names():
        print(policy, *(f"{name} {value:.0f} us" for name, value in measure(policy, 20_000)._asdict().items()))
