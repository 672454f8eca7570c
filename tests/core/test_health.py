"""Engines that fail, pause, vanish and come back: what the core sends where, and when."""

import pytest

from seer_async.errors import FailureKind
from seer_async.events import (
    AbortRequested,
    DrainRequested,
    EngineDown,
    EngineHeld,
    EngineRemoved,
    EngineReport,
    EngineUp,
)

from .hand import Hand

FAULTS = [FailureKind.SERVER, FailureKind.TIMEOUT, FailureKind.BAD_REPLY, FailureKind.CONNECTION]
CHUNKS = {"rollout": {"chunk_size": 10, "max_attempts": 100}}
FRAGILE = {"engine": {"eject_after": 1, "eject_s": 1.0, "eject_max_s": 8.0}}


@pytest.mark.parametrize("kind", FAULTS)
def test_failures_in_a_row_close_an_engine(kind: FailureKind) -> None:
    hand = Hand(engine={"eject_after": 3, "eject_s": 1.0}, **CHUNKS).up().groups("g", n=1)
    hand.fail("g/0", kind)
    hand.fail("g/0", kind)
    assert hand.running == ["g/0"]
    hand.fail("g/0", kind)
    assert hand.running == []
    assert hand.wakes[-1] == 1.0
    hand.wake(0.9)
    assert hand.running == []
    hand.wake(1.0)
    assert hand.running == ["g/0"]


def test_a_success_between_failures_forgives_them() -> None:
    hand = Hand(engine={"eject_after": 2}, **CHUNKS).up().groups("g", n=1)
    for _ in range(5):
        hand.fail("g/0")
        hand.answer("g/0")
    assert hand.running == ["g/0"]


def test_calls_that_fail_together_are_one_incident() -> None:
    hand = Hand(**FRAGILE, **CHUNKS).up().groups("g", n=5)
    for n in range(5):
        hand.fail(f"g/{n}")
    hand.wake(1.0)
    assert len(hand.running) == 1  # closed for one second, not for sixteen


def test_behind_a_closed_engine_one_call_tries_it_and_the_pause_doubles() -> None:
    hand = Hand(**FRAGILE, **CHUNKS).up().groups("g", n=5)
    for n in range(5):
        hand.fail(f"g/{n}")
    for pause in (2.0, 4.0, 8.0, 8.0):
        hand.wake(hand.now + 100.0)
        assert len(hand.running) == 1
        hand.fail(hand.running[0])
        assert hand.wakes[-1] == hand.now + pause
    hand.wake(hand.now + 8.0)
    hand.answer(hand.running[0])
    assert len(hand.running) == 5
    hand.fail("g/4")
    assert hand.core.instances["a"].closed_until == hand.now + 1.0  # a success has forgiven the earlier ones


def test_failing_for_days_overflows_nothing() -> None:
    hand = Hand(engine={"eject_after": 1, "eject_s": 1.0, "eject_max_s": 30.0}, rollout={"max_attempts": 10**6})
    hand.up().groups("g")
    for _ in range(1500):
        hand.fail("g/0")
        hand.wake(hand.now + 30.0)
    assert hand.running == ["g/0"]


def test_a_request_is_not_sent_again_to_the_engine_that_failed_it() -> None:
    hand = Hand("a", "b", scheduler={"affinity": 100.0}, **CHUNKS).up().groups("g")
    for _ in range(4):
        before = hand.engine_of["g/0"]
        hand.fail("g/0")
        assert hand.engine_of["g/0"] != before


def test_it_is_sent_there_when_there_is_no_other() -> None:
    hand = Hand("a", "b", **CHUNKS).up("a").groups("g")
    hand.fail("g/0")
    assert hand.engine_of == {"g/0": "a"}


@pytest.mark.parametrize(("retry_after", "pause"), [(2.5, 2.5), (None, 1.0)])
def test_a_busy_engine_gets_the_pause_it_asks_for_and_no_blame(retry_after: float | None, pause: float) -> None:
    hand = Hand(**FRAGILE, rollout={"max_attempts": 1}).up().groups("g")
    hand.fail("g/0", FailureKind.BUSY, retry_after=retry_after)
    assert hand.wakes == [pause]
    hand.wake(pause)
    assert hand.running == ["g/0"]
    instance = hand.core.instances["a"]
    assert (instance.failures, instance.ejections, instance.half_open) == (0, 0, False)


def test_a_call_aborted_before_its_first_token_pauses_the_engine() -> None:
    """An engine that is paused answers so, at once: without a pause the two would go round and round."""
    hand = Hand(**CHUNKS).up().groups("g")
    hand.answer("g/0", 0, "abort")
    assert hand.running == []
    assert hand.records == []
    hand.wake(1.0)
    assert hand.running == ["g/0"]


def test_a_rejected_call_tries_one_other_engine_then_fails() -> None:
    hand = Hand("a", "b", "c", **FRAGILE, **CHUNKS).up().groups("g")
    first = hand.engine_of["g/0"]
    hand.fail("g/0", FailureKind.REJECTED)
    assert hand.engine_of["g/0"] != first
    hand.fail("g/0", FailureKind.REJECTED)
    assert hand.samples["g/0"].finish_reason == "error"
    assert hand.samples["g/0"].error == "rejected: it says no"
    assert not any(i.failures or i.ejections for i in hand.core.instances.values())


def test_a_request_fails_after_as_many_failures_in_a_row_as_allowed() -> None:
    hand = Hand(engine={"eject_after": 100}, rollout={"chunk_size": 10, "max_attempts": 3}).up().groups("g").close()
    hand.fail("g/0")
    hand.fail("g/0")
    hand.answer("g/0")
    hand.fail("g/0")
    hand.fail("g/0")
    assert hand.running == ["g/0"]
    hand.fail("g/0", FailureKind.TIMEOUT)
    sample = hand.samples["g/0"]
    assert (sample.finish_reason, sample.error) == ("error", "timeout: it says no")
    assert len(sample.token_ids) == 10
    assert hand.stopped == "done"


def test_calls_lost_with_their_engine_go_elsewhere_and_blame_nobody() -> None:
    hand = Hand("a", "b", rollout={"chunk_size": 10, "max_attempts": 1}).up("a").groups("g", n=3).up("b")
    hand.down("a")
    assert hand.engine_of == {"g/0": "b", "g/1": "b", "g/2": "b"}


def test_a_new_process_is_a_new_epoch() -> None:
    hand = Hand(**CHUNKS).up(boot="one").groups("g")
    lost = hand.sent[0]
    hand.up(boot="two")
    assert [(call.request, call.epoch) for call in hand.sent] == [("g/0", 2)]
    assert hand.sent[0].call != lost.call


def test_what_is_said_of_an_engine_that_was_removed_counts_for_nothing() -> None:
    hand = Hand("a", "b", **CHUNKS).up().groups("g")
    hand.report("b")
    stats, info = hand.core.instances["b"].stats, hand.core.instances["b"].info
    assert stats is not None
    assert info is not None
    hand.post(EngineRemoved(engine="b"))
    for event in (
        EngineDown(engine="b", reason="late"),
        EngineUp(engine="b", info=info),
        EngineReport(engine="b", stats=stats),
        EngineHeld(engine="b", held=True),
        EngineRemoved(engine="b"),
    ):
        assert hand.post(event) == []
    assert hand.engine_of == {"g/0": "a"}


# Nothing can go on


def test_a_sequence_too_long_for_every_engine_fails_and_says_so() -> None:
    hand = Hand("a", "b", rollout={"chunk_size": 0}).up("a", blocks=3).groups("g", limit=30)
    assert hand.samples == {}  # b may be larger
    hand.up("b", blocks=3)
    assert hand.samples["g/0"].error == "too long: a sequence of 33 tokens does not fit any engine's KV cache"


def test_without_an_engine_patience_ends_the_run() -> None:
    hand = Hand(engine={"patience_s": 10.0}).groups("g").close()
    assert hand.wakes == [10.0]
    hand.wake(9.9)
    assert hand.stopped is None
    hand.wake(10.0)
    assert hand.stopped == "no_engine"


def test_patience_begins_when_the_last_engine_goes() -> None:
    hand = Hand(engine={"patience_s": 10.0}).up().groups("g").close()
    hand.now = 100.0
    hand.down("a")
    assert hand.wakes == [110.0]
    hand.now = 105.0
    hand.up(boot="again")
    hand.answer("g/0", 1)
    assert hand.running == ["g/0"]
    hand.now = 109.0
    hand.down("a")
    hand.wake(110.0)
    assert hand.stopped is None
    hand.wake(119.0)
    assert hand.stopped == "no_engine"


def test_patience_also_ends_a_run_whose_engines_are_all_unfit() -> None:
    hand = Hand("a", "b", engine={"patience_s": 10.0}, **CHUNKS).up().groups("g").close()
    hand.fail("g/0", FailureKind.REJECTED)
    hand.down(hand.engine_of["g/0"])  # the one left has rejected the request
    assert hand.running == []
    hand.wake(10.0)
    assert hand.stopped == "no_engine"


# Ending on purpose


def test_drain_waits_for_what_is_in_flight_and_starts_nothing() -> None:
    hand = Hand(**CHUNKS).up().groups("g", n=2).close()
    hand.post(DrainRequested())
    assert hand.stopped is None
    hand.answer("g/0")
    assert hand.running == ["g/1"]
    hand.fail("g/1")
    assert hand.stopped == "drained"
    assert len(hand.records) == 1


def test_abort_cancels_what_is_in_flight() -> None:
    hand = Hand(**CHUNKS).up().groups("g", n=2).close()
    hand.post(DrainRequested())
    hand.post(AbortRequested())
    assert hand.running == []
    assert hand.stopped == "aborted"
    assert hand.post(AbortRequested()) == []
