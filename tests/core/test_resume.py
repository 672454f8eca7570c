"""A new core goes on where the journal ends: groups first, then what the journal holds, then the end of input."""

import pytest

from seer_async.events import Restored

from .hand import Hand

TENS = {"rollout": {"chunk_size": 10}}


def resumed(first: Hand, *, emitted: tuple[str, ...] = (), limit: int = 100, **tree: object) -> Hand:
    hand = Hand(**(TENS | tree)).groups("g", n=3, limit=limit)
    for record in first.records:
        hand.post(Restored(record=record, emitted=record.request in emitted))
    return hand.close()


def begun(**tree: object) -> Hand:
    """g/0 has finished with 3 tokens, g/1 has 10, g/2 nothing."""
    hand = Hand(**(TENS | tree)).up().groups("g", n=3)
    hand.answer("g/0", 3, "stop")
    hand.answer("g/1")
    return hand


def test_unfinished_responses_continue_from_their_last_chunk() -> None:
    hand = resumed(begun(), emitted=("g/0",)).up()
    assert hand.samples == {}
    assert {call.request: len(call.prefix) - 3 for call in hand.sent} == {"g/1": 10, "g/2": 0}
    hand.answer("g/1", 1, "stop")
    hand.answer("g/2", 1, "stop")
    assert hand.stopped == "done"
    sample = hand.samples["g/1"]
    assert sample.token_ids == [*range(1000, 1011)]
    assert [chunk.n for chunk in sample.chunks] == [0, 1]


def test_what_finished_but_was_not_written_is_written_now() -> None:
    hand = resumed(begun())
    assert list(hand.samples) == ["g/0"]
    assert hand.samples["g/0"].token_ids == [1000, 1001, 1002]


def test_a_run_whose_journal_is_complete_ends_at_once() -> None:
    first = begun()
    first.answer("g/1", 1, "stop")
    first.answer("g/2", 1, "stop")
    hand = resumed(first, emitted=("g/0", "g/1", "g/2"))
    assert hand.stopped == "done"
    assert hand.samples == {}


def test_restarts_are_part_of_the_journal() -> None:
    first = begun()
    first.answer("g/1", version="new")
    assert first.records[-1].chunk is None
    hand = resumed(first).up()
    assert {call.request: len(call.prefix) - 3 for call in hand.sent} == {"g/1": 0, "g/2": 0}


def test_what_finished_before_still_tells_how_long_the_group_is() -> None:
    hand = resumed(begun(), emitted=("g/0",))
    assert hand.core.context.estimate(hand.core.buffer.groups["g"]) == 10


def test_a_response_keeps_to_its_weights() -> None:
    first = begun()
    hand = resumed(first, emitted=("g/0",)).up(version="newer")
    assert {call.request: len(call.prefix) - 3 for call in hand.sent} == {"g/1": 0, "g/2": 0}
    assert hand.core.responses.restarts == 1


def test_a_response_longer_than_todays_limit_is_at_its_end() -> None:
    hand = resumed(begun(), emitted=("g/0",), limit=8)
    assert hand.samples["g/1"].finish_reason == "length"
    assert len(hand.samples["g/1"].token_ids) == 10


@pytest.mark.parametrize("policy", ["seer", "foresight", "no-context"])
def test_what_is_recorded_beyond_todays_limit_counts(policy: str) -> None:
    """Of g/0 and g/1 records follow the one that reaches the limit; g/0 is written already."""
    first = Hand(**TENS).up().groups("g", n=3)
    for request in ("g/0", "g/1", "g/2"):
        first.answer(request)
        first.answer(request)
    first.answer("g/0", 5, "stop")
    first.answer("g/1", 5, "stop")
    hand = resumed(first, emitted=("g/0",), limit=15, scheduler={"policy": policy})
    reasons = {name: (sample.finish_reason, len(sample.token_ids)) for name, sample in hand.samples.items()}
    assert reasons == {"g/1": ("stop", 25), "g/2": ("length", 20)}
    assert hand.stopped == "done"


def test_the_seed_of_a_sample_outlives_its_orchestrator() -> None:
    first = Hand(**TENS).up().groups("g", n=3)
    again = Hand(**TENS).up().groups("g", n=3)
    assert [call.params["seed"] for call in first.sent] == [call.params["seed"] for call in again.sent]
