"""The conservation check: what must hold of a core between any two events.

Tests call `check` after every event. It is O(requests), so a live run does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.request import TERMINAL, State

if TYPE_CHECKING:
    from seer_async.core import Core
    from seer_async.request import Request


def check(core: Core) -> None:
    """Raise AssertionError where the core contradicts itself."""
    _check_counts(core)
    _check_groups(core)
    _check_calls(core)
    _check_room(core)
    for request in core.buffer.requests.values():
        _check_request(core, request)


def _check_counts(core: Core) -> None:
    for state, count in core.buffer.counts.items():
        actual = sum(r.state is state for r in core.buffer.requests.values())
        forgotten = core.lasting and state in TERMINAL and actual < count
        assert actual == count or forgotten, f"{count} requests counted as {state}, {actual} are"


def _check_groups(core: Core) -> None:
    groups = core.buffer.groups.values()
    for group in groups:
        actual = sum(request.state not in TERMINAL for request in group.requests)
        assert group.open == actual, f"{group.open} requests of {group.id} are counted as open, {actual} are"
        assert actual or not core.lasting, f"{group.id} has ended and is not forgotten"
    members = {request.id: request for group in groups for request in group.requests}
    assert members == core.buffer.requests, "the requests are not those of the groups"


def _check_calls(core: Core) -> None:
    running = {r.call for r in core.buffer.requests.values() if r.state is State.RUNNING}
    assert running == set(core.calls), "RUNNING requests and calls in flight differ"
    for call in core.calls.values():
        assert call.request.call == call.id, f"call {call.id} is not what {call.request.id} waits for"
        assert call.instance.up, f"call {call.id} is in flight on {call.instance.name}, which is down"
        assert call.epoch == call.instance.epoch, f"call {call.id} is of an earlier epoch"
        assert call.generated == call.request.generated, f"{call.request.id} changed while call {call.id} was in flight"


def _check_room(core: Core) -> None:
    for instance in core.instances.values():
        mine = {call.id for call in core.calls.values() if call.instance is instance}
        assert mine == set(instance.in_flight), f"{instance.name} holds room for other calls than are in flight"
        own = sum(blocks for blocks, _ in instance.in_flight.values())
        shared = {id(sharers): sharers.blocks for _, sharers in instance.in_flight.values()}
        assert instance.reserved == own + sum(shared.values()), f"{instance.name} leaks reserved blocks"


def _check_request(core: Core, request: Request) -> None:
    if request.state not in TERMINAL:
        assert request.generated == len(request.tokens) == len(request.logprobs), f"{request.id} miscounts its tokens"
        assert request.generated == sum(chunk.tokens for chunk in request.chunks), f"{request.id} is not its chunks"
    restoring = not (core.lasting or core.buffer.closed)  # what is over today's limit ends when all records are in
    assert request.generated <= request.group.limit or request.state in TERMINAL or restoring, (
        f"{request.id} is over its limit"
    )
    assert (request.call is not None) == (request.state is State.RUNNING), (
        f"{request.id} holds a call while not running"
    )
    assert not request.closing or request.state is State.RUNNING or request.state in TERMINAL, (
        f"{request.id} was to end with its call"
    )
    assert [chunk.n for chunk in request.chunks] == list(range(len(request.chunks))), f"{request.id} skips a chunk"
    versions = {chunk.weight_version for chunk in request.chunks}
    assert len(versions) <= 1 or request.mixed, f"{request.id} mixes versions {versions} unmarked"
    if request.state in TERMINAL:
        assert request.finish_reason is not None, f"{request.id} ended without a reason"
    assert core.context.estimate(request.group) >= min(request.generated, request.group.limit), (
        "an estimate is below what was seen"
    )
