"""A core that lasts: groups come, are joined and forgotten, and nothing of them stays."""

import pytest

from seer_async.events import RequestsCancelled
from seer_async.policies.queues import LEAST_SWEEP

from .hand import Hand

TENS = {"rollout": {"chunk_size": 10}}


def test_a_group_is_joined_while_open_and_forgotten_when_it_has_ended() -> None:
    hand = Hand(lasting=True, **TENS).up().groups("g", n=2)
    hand.answer("g/0", 3, "stop")
    hand.groups("g", n=1)
    assert hand.running == ["g/1", "g/2"]
    hand.answer("g/1", 3, "stop")
    hand.post(RequestsCancelled(requests=("g/2",)))
    assert not hand.core.buffer.groups
    assert not hand.core.buffer.requests
    assert (hand.core.buffer.total, hand.core.buffer.open) == (3, 0)
    hand.groups("g", n=1)  # another one of this name
    assert hand.running == ["g/0"]


@pytest.mark.parametrize("policy", ["seer", "foresight", "no-context"])
def test_no_policy_keeps_what_is_forgotten(policy: str) -> None:
    """A long group waits all the time, so that nothing that is shorter comes to the top of a heap."""
    hand = Hand(lasting=True, scheduler={"policy": policy, "probes": 0, "fairness": 10**6}, **TENS)
    hand.groups("long", n=3, limit=1000).up(seqs=1)
    for number in range(4 * LEAST_SWEEP):
        hand.groups(f"g{number}", n=1, limit=20)
        hand.post(RequestsCancelled(requests=(f"g{number}/0",)))
    heaps = [value for value in vars(hand.core.policy).values() if isinstance(value, list)]
    queues = [value._heap for value in vars(hand.core.policy).values() if hasattr(value, "_heap")]
    assert max(map(len, heaps + queues)) <= 2 * LEAST_SWEEP
