"""Who goes next, and where: each policy on cases small enough to work out by hand."""

import pytest

from seer_async.config import SchedulerConfig, resolve
from seer_async.context import Context
from seer_async.errors import ConfigError, FailureKind
from seer_async.events import Restored
from seer_async.options import GroupOptions
from seer_async.policies import find_policy
from seer_async.request import Group, Request
from seer_async.types import Prompt

from .hand import Hand

ONE_AT_A_TIME = {"engine": {"max_in_flight": 1}}
TENS = {"rollout": {"chunk_size": 10}}


def one_at_a_time(policy: str, **scheduler: object) -> Hand:
    """Chunks of 10 tokens, one call at a time, so that the order of calls is the policy's order."""
    lengths = scheduler.pop("true_lengths", None)
    return Hand(scheduler={"policy": policy} | scheduler, lengths=lengths, **ONE_AT_A_TIME, **TENS)


def finish(hand: Hand, request: str, tokens: int) -> None:
    """Let a request end after `tokens` more tokens of its current chunk."""
    hand.answer(request, tokens, "stop")


# seer


def test_probes_go_first_and_the_shortest_of_them_leads() -> None:
    hand = one_at_a_time("seer").groups("a", "b", "c", n=2).up()
    assert hand.running == ["a/0"]
    hand.answer("a/0")
    assert hand.running == ["b/0"]
    hand.answer("b/0")
    hand.answer("c/0", 9, "abort")
    assert hand.running == ["c/0"]  # 9 tokens are fewer than 10
    hand.answer("c/0")
    assert hand.running == ["a/0"]  # 10 tokens, and first in the dataset
    hand.answer("a/0")
    assert hand.running == ["b/0"]
    finish(hand, "b/0", 1)
    assert hand.running == ["c/0"]


def test_then_the_group_with_the_largest_estimate() -> None:
    hand = one_at_a_time("seer").groups("a", "b", "c", n=3).up()
    finish(hand, "a/0", 4)
    finish(hand, "b/0", 8)
    finish(hand, "c/0", 6)
    order = []
    while hand.sent:
        order.append(hand.running[0])
        finish(hand, order[-1], 1)
    assert order == ["b/1", "b/2", "c/1", "c/2", "a/1", "a/2"]


def test_a_group_without_a_finished_response_counts_as_long_as_its_limit() -> None:
    hand = one_at_a_time("seer", probes=0).groups("a", n=2, limit=50).groups("b", n=2, limit=60).up()
    assert hand.running == ["b/0"]
    finish(hand, "b/0", 9)
    assert hand.running == ["a/0"]
    finish(hand, "a/0", 10)
    assert hand.running == ["a/1"]  # 10 against 9


def test_an_estimate_rises_with_what_is_seen() -> None:
    hand = one_at_a_time("seer").groups("a", "b", n=3).up()
    finish(hand, "a/0", 9)
    finish(hand, "b/0", 5)
    hand.answer("a/1")  # a is at least 10 now
    assert hand.core.context.estimate(hand.core.buffer.groups["a"]) == 10
    assert hand.running == ["a/1"]  # in the group, the one that has generated most
    finish(hand, "a/1", 1)
    assert hand.running == ["a/2"]


def test_one_decision_in_fairness_goes_to_the_one_that_has_waited_longest() -> None:
    hand = one_at_a_time("seer", fairness=3).groups("a", "b", n=4).up()
    finish(hand, "a/0", 1)
    finish(hand, "b/0", 9)
    assert hand.running == ["a/1"]  # the third decision: b is longer, a has waited as long and comes first
    finish(hand, "a/1", 1)
    assert hand.running == ["b/1"]
    finish(hand, "b/1", 1)
    assert hand.running == ["b/2"]
    finish(hand, "b/2", 1)
    assert hand.running == ["a/2"]  # the sixth


def test_forced_lengths_are_hidden_from_the_policy() -> None:
    orders = []
    for forced in (None, (1, 1), (90, 90)):
        hand = one_at_a_time("seer", probes=0).groups("a", n=2, forced_lengths=forced).groups("b", n=2).up()
        orders.append(hand.running)
    assert orders == [["a/0"]] * 3


def test_resumed_groups_are_ranked_by_what_the_journal_holds() -> None:
    first = one_at_a_time("seer", probes=2).groups("a", n=4).up()
    finish(first, "a/0", 5)
    first.answer("a/1")
    hand = one_at_a_time("seer", probes=2).groups("a", n=4)
    for record in first.records:
        hand.post(Restored(record=record))
    hand.up()
    assert hand.running == ["a/1"]
    hand.fail("a/1", FailureKind.REJECTED)
    assert hand.running == ["a/2"]


# The Context Manager


def make_group(limit: int) -> tuple[Group, list[Request]]:
    group = Group(Prompt(id="g", token_ids=[1]), 0, limit, GroupOptions())
    group.requests += [Request(group, index, 0, 0.0) for index in range(3)]
    return group, group.requests


def test_an_estimate_falls_once_and_then_only_rises() -> None:
    group, (first, second, third) = make_group(limit=100)
    context = Context()
    second.generated = 30
    context.observe(second)
    assert context.estimate(group) == 100
    first.generated = 20
    context.finish(first)
    assert context.estimate(group) == 30  # never below what was generated
    third.generated = 10
    context.finish(third)
    assert context.estimate(group) == 30
    second.generated = 40
    context.observe(second)
    assert context.estimate(group) == 40


# The others


def test_no_context_goes_in_dataset_order_also_with_continuations() -> None:
    hand = one_at_a_time("no-context").groups("a", "b", n=2, limit=20).up()
    order = []
    while hand.sent:
        order.append(hand.running[0])
        hand.answer(order[-1])
    assert order == ["a/0", "a/0", "a/1", "a/1", "b/0", "b/0", "b/1", "b/1"]


def test_oracle_takes_what_has_most_left() -> None:
    lengths = {"a/0": 15, "a/1": 40, "b/0": 32, "b/1": 5}
    hand = one_at_a_time("oracle", true_lengths=lengths).groups("a", "b", n=2).up()
    order = []
    left = dict(lengths)
    while hand.sent:
        request = hand.running[0]
        order.append(request)
        done = min(10, left[request])
        left[request] -= done
        hand.answer(request, done, "length" if left[request] else "stop")
    assert order == ["a/1", "b/0", "a/1", "b/0", "a/1", "a/0", "b/0", "a/1", "a/0", "b/1", "b/0"]


def test_oracle_without_lengths_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.lengths"):
        find_policy("oracle")(SchedulerConfig(policy="oracle"), Context())


def test_round_robin_deals_whole_groups_and_whole_requests() -> None:
    hand = Hand("a", "b", scheduler={"policy": "group-round-robin"}, **TENS)
    hand.up(blocks=11).groups("g", "h", "i", n=3)  # room for one request of 103 tokens, which is no matter here
    assert hand.engine_of == {f"{g}/{n}": "a" if g in "gi" else "b" for g in "ghi" for n in range(3)}
    assert {call.max_tokens for call in hand.sent} == {100}


def test_round_robin_binds_a_group_anew_only_when_its_engine_is_lost() -> None:
    hand = Hand("a", "b", scheduler={"policy": "group-round-robin"}).up().groups("g", "h", n=2)
    hand.down("a")
    assert set(hand.engine_of.values()) == {"b"}
    hand.up("a", boot="again")
    hand.fail("h/0")  # never again on the engine that has just failed it
    assert hand.engine_of == {"g/0": "b", "g/1": "b", "h/1": "b", "h/0": "a"}


@pytest.mark.parametrize("failed", [2, 3])
def test_partial_is_not_content_with_failures(failed: int) -> None:
    """With two of four failed the others must both finish; with three there is one to wait for."""
    hand = Hand(scheduler={"policy": "partial", "over_issue": 2.0}, **TENS).groups("a", "b", n=2).close().up()
    requests = ["a/0", "a/1", "b/0", "b/1"]
    for request in requests[:failed]:
        hand.fail(request, FailureKind.REJECTED)
    for request in requests[failed:]:
        assert hand.stopped is None
        hand.answer(request, 3, "stop")
    assert hand.stopped == "done"
    assert [hand.samples[request].finish_reason for request in requests] == ["error"] * failed + ["stop"] * (4 - failed)


def test_partial_stops_early_and_marks_everything() -> None:
    hand = Hand(scheduler={"policy": "partial", "over_issue": 2.0}, **TENS).groups("a", "b", n=2).close().up()
    hand.answer("b/0", 3, "stop")
    assert hand.stopped is None
    hand.answer("a/1")
    hand.answer("a/0", 2, "stop")
    assert hand.stopped == "done"
    assert hand.sent == []
    reasons = {key: (sample.finish_reason, len(sample.token_ids)) for key, sample in hand.samples.items()}
    assert reasons == {"b/0": ("stop", 3), "a/0": ("stop", 2), "a/1": ("unfinished", 10), "b/1": ("unfinished", 0)}
    assert not any(sample.on_policy for sample in hand.samples.values())


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="group-round-robin, no-context, oracle, partial, seer"):
        find_policy("fifo")


def test_a_policy_may_come_from_anywhere() -> None:
    assert find_policy("seer_async.policies.partial:Partial").name == "partial"
    with pytest.raises(ConfigError, match="defines no policy class"):
        find_policy("seer_async.policies.partial:Nothing")


# Placement


def test_engines_are_filled_in_proportion_to_their_room() -> None:
    hand = Hand("a", "b", "c", scheduler={"affinity": 0}, **TENS)
    hand.up("a", blocks=100).up("b", blocks=400).up("c", blocks=200).groups("g", n=7)
    placed = [call.engine for call in hand.sent]
    assert placed[0] == "b"
    assert {name: placed.count(name) for name in "abc"} == {"a": 1, "b": 4, "c": 2}


def test_a_chunk_is_admitted_only_where_its_bound_fits() -> None:
    hand = Hand(**TENS).up(blocks=5).groups("g", n=3)
    assert hand.running == ["g/0", "g/1"]  # 13 tokens are 2 blocks each
    hand.answer("g/0")  # needs 3 now, where 3 are free
    assert sorted(hand.running) == ["g/0", "g/1"]


def test_a_request_stays_where_its_prefix_is_while_that_costs_no_balance() -> None:
    hand = Hand("a", "b", scheduler={"affinity": 0.5}, **TENS).up(blocks=100).groups("g", "h")
    home = hand.engine_of["g/0"]
    assert hand.engine_of["h/0"] != home
    hand.answer("g/0")
    assert hand.engine_of["g/0"] == home
    assert hand.core.responses.migrations == 0
    hand.groups("i", "j", "k", "l")
    crowd = hand.engine_of["g/0"]
    for request, engine in list(hand.engine_of.items()):
        if engine != crowd:
            hand.answer(request, 1, "stop")  # the other engine is empty now
    hand.answer("g/0")
    assert hand.engine_of["g/0"] != crowd
    assert hand.core.responses.migrations == 0  # counted when the chunk is accepted
    hand.answer("g/0")
    assert hand.core.responses.migrations == 1


def test_what_others_use_of_an_engine_is_not_ours_to_fill() -> None:
    hand = Hand(**TENS).up(blocks=10)
    hand.report("a", kv_used=0.5)
    hand.groups("g", n=5)
    assert len(hand.sent) == 2  # 2 blocks each


def test_an_engine_that_preempts_is_trusted_less() -> None:
    hand = Hand(**TENS).up(blocks=20)
    hand.report("a", preemptions=0)
    for total in (1, 5, 6):
        hand.report("a", preemptions=total)
    hand.groups("g", n=20)
    assert len(hand.sent) == int(20 * 0.9**3) // 2


def test_preemptions_are_those_that_we_saw() -> None:
    """An engine counts from its start, and from 0 again when it is restarted."""
    hand = Hand(**TENS).up(blocks=20)
    for total in (40, 43):
        hand.report("a", preemptions=total)
    assert hand.core.instances["a"].preempted == 3


def test_an_empty_engine_takes_any_one_chunk_that_fits_it() -> None:
    """Whatever its telemetry says and whatever share of it is ours: nothing else would ever end the wait."""
    hand = Hand(engine={"kv_fraction": 0.5}, **TENS).up(blocks=4)
    hand.report("a", kv_used=1.0)
    hand.groups("g", n=2, limit=30)
    for _ in range(3):
        assert hand.running == ["g/0"]
        hand.answer("g/0")
    assert hand.running == ["g/1"]


def test_a_request_bound_to_a_full_engine_does_not_hold_up_the_others() -> None:
    hand = Hand("a", "b", scheduler={"policy": "no-context"}, engine={"max_in_flight": 1}, **TENS)
    hand.up("a", version="old").groups("g").up("b", version="new")
    hand.answer("g/0", version="old")
    hand.groups("h", "i")
    assert hand.engine_of == {"g/0": "a", "h/0": "b"}
    hand.answer("h/0", version="new")  # h goes on, only on b
    hand.report("a", weight_version="old")
    assert hand.engine_of == {"g/0": "a", "h/0": "b"}
    hand.answer("g/0", 1, "stop", version="old")
    assert hand.engine_of == {"h/0": "b", "i/0": "a"}  # h waits for b alone, and i passes it


def test_what_goes_first_is_not_overtaken_by_what_is_smaller() -> None:
    hand = Hand(scheduler={"policy": "no-context"}, rollout={"chunk_size": 0}).up(blocks=12)
    hand.groups("long", limit=50).groups("longer", limit=90).groups("short", limit=5)
    assert hand.running == ["long/0"]  # 10 blocks are wanted, 6 are free: `short` would fit


@pytest.mark.parametrize("policy", ["seer", "no-context", "partial"])
def test_chunk_size_0_sends_whole_responses(policy: str) -> None:
    hand = Hand(scheduler={"policy": policy}, rollout={"chunk_size": 0}).up().groups("g", limit=77)
    assert [call.max_tokens for call in hand.sent] == [77]


def test_every_policy_ships_a_name_that_finds_it() -> None:
    for name in ("seer", "no-context", "group-round-robin", "oracle", "partial"):
        assert find_policy(name).name == name
        assert resolve({"scheduler": {"policy": name}}).scheduler.policy == name
