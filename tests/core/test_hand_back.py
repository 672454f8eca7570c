"""Requests that end with what their calls in flight have sampled."""

import pytest

from seer_async.errors import FailureKind
from seer_async.events import (
    AdapterChanged,
    EngineHeld,
    Event,
    HandBack,
    HandBackRequested,
    RequestsCancelled,
    VersionSet,
)
from seer_async.options import GroupOptions

from .hand import Hand


def hand(*groups: str, n: int = 1, options: GroupOptions | None = None) -> Hand:
    return Hand("a", "b", rollout={"chunk_size": 10}).groups(*groups, n=n, options=options).up(seqs=1)


def asked(it: Hand, *requests: str) -> list[HandBack]:
    return [each for each in it.post(HandBackRequested(requests=requests)) if isinstance(each, HandBack)]


def test_it_ends_with_what_the_engine_hands_back_and_is_not_sent_again() -> None:
    it = hand("g")
    it.answer("g/0")
    (call,) = it.sent
    assert asked(it, "g/0") == [HandBack(engine=call.engine, calls=(call.call,))]
    assert not it.samples
    it.answer("g/0", 4, finish="abort")
    assert it.samples["g/0"].finish_reason == "abort"
    assert [chunk.tokens for chunk in it.samples["g/0"].chunks] == [10, 4]
    assert len(it.records) == 2
    assert not it.sent


def test_what_is_not_in_flight_ends_at_once_and_others_go_on() -> None:
    it = hand("g", n=3)
    first, second = it.running
    (waiting,) = {"g/0", "g/1", "g/2"} - {first, second}
    (told,) = asked(it, first, waiting, "unknown")
    assert len(told.calls) == 1
    assert it.samples.keys() == {waiting}
    it.answer(second)
    assert second in it.running


def test_a_response_that_ends_by_itself_meanwhile_has_its_own_end() -> None:
    it = hand("g")
    asked(it, "g/0")
    it.answer("g/0", 4, finish="stop")
    assert it.samples["g/0"].finish_reason == "stop"


def test_an_indivisible_response_keeps_what_it_has_got() -> None:
    it = hand("g", options=GroupOptions(indivisible=True))
    asked(it, "g/0")
    it.answer("g/0", 4, finish="abort")
    assert len(it.samples["g/0"].token_ids) == 4


def test_an_engine_that_hands_nothing_back_is_not_taken_for_a_paused_one() -> None:
    it = hand("g")
    asked(it, "g/0")
    it.answer("g/0", 0, finish="abort")
    assert it.samples["g/0"].token_ids == []
    assert not any(instance.closed_until for instance in it.core.instances.values())


def test_who_waits_no_longer_gets_what_was_there_before() -> None:
    it = hand("g")
    it.answer("g/0")
    asked(it, "g/0")
    it.post(RequestsCancelled(requests=("g/0",)))
    assert len(it.samples["g/0"].token_ids) == 10
    assert not it.sent


@pytest.mark.parametrize("happens", ["failure", "rejection", "loss", "hold", "adapter", "weights"])
def test_whatever_happens_to_the_call_it_ends(happens: str) -> None:
    it = hand("g", options=GroupOptions(model="adapter", chunk_size=10))
    it.answer("g/0")
    engine = it.engine_of["g/0"]
    asked(it, "g/0")
    events: dict[str, Event] = {
        "hold": EngineHeld(engine=engine, held=True),
        "adapter": AdapterChanged(model="adapter"),
        "weights": VersionSet(version="other"),
    }
    match happens:
        case "failure" | "rejection":
            it.fail("g/0", FailureKind.SERVER if happens == "failure" else FailureKind.REJECTED)
        case "loss":
            it.down(engine)
        case _:
            it.post(events[happens])
    if happens == "weights":
        it.answer("g/0", 4, finish="abort", version="other")  # not of the weights that the others are of
    sample = it.samples["g/0"]
    assert (sample.finish_reason, len(sample.token_ids)) == ("abort", 10)
    assert not it.sent
