"""A response's tokens are of one weight version, or they are marked."""

import pytest

from seer_async.events import AdapterChanged, ChunkFinished
from seer_async.options import GroupOptions
from seer_async.types import ChunkReply, VersionSpan

from .hand import Hand

RESTART = {"rollout": {"chunk_size": 10}}
MARK = {"rollout": {"chunk_size": 10, "mixed_versions": "mark"}}


def test_a_response_goes_on_only_on_engines_of_its_version() -> None:
    hand = Hand("a", "b", engine={"max_in_flight": 1}, **RESTART).up(version="v1").groups("g", "h")
    other = {"a": "b", "b": "a"}[hand.engine_of["g/0"]]
    hand.report(hand.engine_of["g/0"], weight_version="v2")
    hand.answer("g/0", version="v1")  # sampled just before the update
    assert "g/0" not in hand.running  # the engine with v1 is full
    hand.answer("h/0", 1, "stop", version="v1")
    assert hand.engine_of == {"g/0": other}


def test_when_no_engine_has_its_version_any_more_it_begins_again() -> None:
    hand = Hand("a", "b", **RESTART).up(version="v1").groups("g")
    hand.answer("g/0", version="v1")
    busy = hand.engine_of["g/0"]
    for engine in "ab":
        hand.report(engine, weight_version="v2")
    hand.down(busy)
    assert [(call.prefix, call.weight_version) for call in hand.sent] == [([1, 2, 3], "v2")]
    assert hand.records[-1].chunk is None
    assert hand.core.responses.restarts == 1
    hand.answer("g/0", 2, "stop", version="v2")
    sample = hand.samples["g/0"]
    assert (len(sample.token_ids), sample.weight_version, sample.on_policy) == (2, "v2", True)
    assert [chunk.n for chunk in sample.chunks] == [0]


def mixed_reply(hand: Hand, request: str) -> None:
    call = hand.take(request)
    spans = (VersionSpan("v1", 0, 4), VersionSpan("v2", 4, 10))
    reply = ChunkReply(token_ids=[7] * 10, logprobs=[-1.0] * 10, finish_reason="length", versions=spans)
    hand.post(ChunkFinished(call=call.call, reply=reply))


def test_a_reply_of_two_versions_is_thrown_away() -> None:
    hand = Hand(**RESTART).up(version="v1").groups("g")
    mixed_reply(hand, "g/0")
    assert [(call.prefix, call.weight_version) for call in hand.sent] == [([1, 2, 3], "v2")]
    assert [record.chunk for record in hand.records] == [None]


def test_or_marked() -> None:
    hand = Hand(**MARK).up(version="v1").groups("g")
    mixed_reply(hand, "g/0")
    hand.answer("g/0", 1, "stop", version="v2")
    sample = hand.samples["g/0"]
    assert (len(sample.token_ids), sample.on_policy, sample.weight_version) == (11, False, "v2")


def test_a_marked_run_continues_anywhere() -> None:
    hand = Hand("a", "b", **MARK).up("a", version="v1").groups("g").up("b", version="v2")
    hand.answer("g/0", version="v1")
    hand.down("a")
    assert hand.engine_of == {"g/0": "b"}
    hand.answer("g/0", 1, "stop", version="v2")
    assert len(hand.samples["g/0"].token_ids) == 11
    assert not hand.samples["g/0"].on_policy


@pytest.mark.parametrize(("after", "restarts"), [("v1", 0), ("v2", 1)])
def test_an_engine_that_names_no_versions_is_asked_afterwards(after: str, restarts: int) -> None:
    hand = Hand(**RESTART).up(version="v1").groups("g")
    hand.answer("g/0", version_after=after)
    assert hand.core.responses.restarts == restarts
    assert hand.sent[0].weight_version == after


def test_a_reply_knows_of_new_weights_before_the_telemetry_does() -> None:
    hand = Hand(engine={"max_in_flight": 1}, **RESTART).up(version="v1").groups("g", "h")
    hand.answer("g/0", 1, "stop", version="v2")
    assert hand.sent[0].weight_version == "v2"
    assert hand.core.responses.restarts == 0


def test_a_reading_of_another_process_says_nothing() -> None:
    hand = Hand(**RESTART).up(boot="one", version="v1").up(boot="two", version="v2")
    hand.report("a", boot="one", weight_version="v1", kv_used=1.0, preemptions=3)
    assert hand.core.instances["a"].version == "v2"
    assert hand.core.instances["a"].stats is None


@pytest.mark.parametrize("mixed", ["restart", "mark"])
def test_what_an_adapter_before_has_sampled_is_not_gone_on_with(mixed: str) -> None:
    hand = Hand(**RESTART).up(version="v1")
    for model in ("", "tiny"):
        options = GroupOptions(chunk_size=10, model=model, salt="s", mixed_versions=mixed)
        hand.groups(model or "base", options=options)
    assert [(call.model, call.salt) for call in hand.sent] == [("", "/s"), ("tiny", "@tiny#0/s")]
    for request in ("base/0", "tiny/0"):
        hand.answer(request, version="v1")
    hand.post(AdapterChanged(model="tiny"))
    base, tiny = hand.sent
    assert (len(base.prefix), base.salt) == (13, "/s")
    assert (len(tiny.prefix), tiny.salt) == (3 if mixed == "restart" else 13, "@tiny#1/s")
    for request in ("base/0", "tiny/0"):
        hand.answer(request, 1, "stop", version="v1")
    assert [hand.samples[request].on_policy for request in ("base/0", "tiny/0")] == [True, mixed == "restart"]
