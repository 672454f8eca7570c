"""A core that lasts: groups come, are joined and forgotten, and nothing of them stays."""

import pytest

from seer_async.events import EngineHeld, Paused, RequestsCancelled, Resumed
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


# Requests that no engine can take, while others keep the fleet busy


def busy(**engine: object) -> Hand:
    """`a` works on `small`; `big/0` fits `b` only, which is not there."""
    hand = Hand("a", "b", lasting=True, engine={"patience_s": 10.0, **engine}, rollout={"chunk_size": 0})
    return hand.up("a", blocks=3).groups("small", limit=20).groups("big", limit=90)


def test_what_no_engine_can_take_fails_after_patience_although_others_run() -> None:
    hand = busy()
    assert hand.wakes == [10.0]
    hand.wake(9.9)
    assert not hand.samples
    hand.wake(10.0)
    assert hand.samples["big/0"].error == "no usable engine: none answers"
    assert hand.running == ["small/0"]
    assert not hand.core.buffer.groups.keys() - {"small"}


def test_it_fails_too_when_it_is_behind_what_waits_for_room() -> None:
    hand = busy(max_in_flight=1).groups("next", limit=20)
    hand.wake(10.0)
    assert hand.samples.keys() == {"big/0"}


def test_what_waits_for_room_waits_as_long_as_it_takes() -> None:
    hand = busy().up("b", blocks=10).groups("more", limit=90)
    assert hand.running == ["small/0", "big/0"]
    for at in (10.0, 100.0):
        hand.wake(at)
        hand.report("a")
        assert not hand.samples


@pytest.mark.parametrize("why", ["closed", "held"])
def test_what_waits_for_an_engine_that_is_up_waits_as_long_as_it_takes(why: str) -> None:
    hand = busy(eject_after=1, eject_s=60.0, eject_max_s=60.0).up("b", blocks=10)
    if why == "closed":
        hand.fail("big/0")
    else:
        hand.post(EngineHeld(engine="b", held=True))
    hand.wake(59.0)
    assert hand.running == ["small/0"]
    assert not hand.samples
    hand.now = 60.0
    hand.post(EngineHeld(engine="b", held=False))
    assert hand.running == ["small/0", "big/0"]


def test_patience_begins_anew_when_its_engine_was_there_in_between() -> None:
    hand = busy()
    hand.now = 9.0
    hand.up("b", blocks=10)
    hand.down("b")
    hand.wake(18.9)
    assert not hand.samples
    hand.wake(19.0)
    assert hand.samples.keys() == {"big/0"}


def test_what_will_begin_again_with_other_weights_is_not_lost() -> None:
    """Although what waits for room goes before it."""
    hand = Hand("a", "b", lasting=True, engine={"patience_s": 10.0, "max_in_flight": 1}, **TENS)
    hand.up("b").groups("g", limit=90)
    hand.answer("g/0")
    hand.up("a", blocks=2).groups("small", limit=7)
    hand.down("b")
    hand.groups("next", limit=7)
    hand.now = 10.0
    hand.report("a", weight_version="new")
    hand.wake(10.0)
    assert not hand.samples


def test_a_pause_does_not_count() -> None:
    hand = busy()
    hand.post(Paused())
    hand.wake(100.0)
    hand.post(Resumed())
    hand.wake(109.0)
    assert not hand.samples
    hand.wake(110.0)
    assert hand.samples.keys() == {"big/0"}


def test_a_rollout_goes_on_as_long_as_it_can() -> None:
    hand = Hand("a", "b", engine={"patience_s": 10.0}, rollout={"chunk_size": 0})
    hand.up("a", blocks=3).groups("small", limit=20).groups("big", limit=90).close()
    hand.wake(10.0)
    assert hand.running == ["small/0"]
    assert not hand.samples
    assert hand.stopped is None
