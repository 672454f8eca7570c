"""Calls in flight: what leaves for an engine, and which reply still counts.

Invariants: a call's number is never used again; a call is here exactly while its request waits for it, in the epoch of
the engine it was sent to; what it reserved there is given back when it leaves the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from seer_async.events import Cancel, Dispatch, HandBack
from seer_async.instance import Instance
from seer_async.request import Request
from seer_async.sampling import call_params

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from seer_async.buffer import RequestBuffer
    from seer_async.policies import Policy
    from seer_async.turn import Turn
    from seer_async.versions import Versions


class Call(msgspec.Struct):
    """A call in flight: what its reply must match."""

    id: int
    request: Request
    instance: Instance
    epoch: int
    n: int
    generated: int
    max_tokens: int
    weight_version: str
    start: float


class Calls(Mapping[int, Call]):
    """By number. Whoever takes a call out moves its request on."""

    def __init__(self, turn: Turn, run: str, buffer: RequestBuffer, policy: Policy, versions: Versions) -> None:
        self._turn = turn
        self._run = run
        self._buffer = buffer
        self._policy = policy
        self._versions = versions
        self._calls: dict[int, Call] = {}
        self._sent = 0

    def __getitem__(self, call: int) -> Call:
        return self._calls[call]

    def __iter__(self) -> Iterator[int]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def send(self, request: Request, instance: Instance, *, tokens: int, most: int) -> None:
        """Ask for `most` tokens more; the sequence then has at most `tokens`, for which room is reserved."""
        self._sent += 1
        call = Call(
            id=self._sent,
            request=request,
            instance=instance,
            epoch=instance.epoch,
            n=len(request.chunks),
            generated=request.generated,
            max_tokens=most,
            weight_version=instance.version,
            start=self._turn.now,
        )
        self._calls[call.id] = call
        instance.dispatch(call.id, request, tokens)
        request.attempt += 1
        if request.first_start is None:
            request.first_start = self._turn.now
        self._buffer.run(request, call.id)
        self._turn.say(self._dispatch(call))

    def close(self, call_id: int) -> Call | None:
        """Take out a call that was answered; None if its request does not wait for it any more."""
        call = self._calls.pop(call_id, None)
        if call is not None:
            assert call.request.call == call_id
            assert call.epoch == call.instance.epoch
            call.instance.release(call_id)
        return call

    def drop(self, call_id: int) -> Request:
        """Give up a call; returns its request."""
        call = self._calls[call_id]
        self._turn.say(Cancel(call=call_id, engine=call.instance.name))
        self.close(call_id)
        return call.request

    def hand_back(self, calls: Iterable[int]) -> None:
        """Have calls answered with what has been sampled; until then they are in flight."""
        told: dict[str, list[int]] = {}
        for call in calls:
            told.setdefault(self._calls[call].instance.name, []).append(call)
        for engine, its in told.items():
            self._turn.say(HandBack(engine=engine, calls=tuple(its)))

    def lose(self, instance: Instance, reason: str) -> list[Request]:
        """The engine is gone, and its calls with it; returns their requests."""
        requests = []
        for call in instance.lost(reason):
            self._turn.say(Cancel(call=call, engine=instance.name))
            requests.append(self._calls.pop(call).request)
        return requests

    def _dispatch(self, call: Call) -> Dispatch:
        request, options = call.request, call.request.group.options
        return Dispatch(
            call=call.id,
            n=call.n,
            engine=call.instance.name,
            epoch=call.epoch,
            request=request.id,
            prefix=request.prefix(),
            params=call_params(
                options.sampling,
                seed=request.seed,
                prompt_len=request.group.prompt_len,
                generated=request.generated,
                max_tokens=call.max_tokens,
                position_seeds=call.instance.position_seeds,
                ignore_eos=request.forced_length is not None,
                kinship=self._kinship(call) if call.instance.drafts else None,
                passed=options.passed,
            ),
            max_tokens=call.max_tokens,
            weight_version=call.weight_version,
            model=options.model,
            salt=self._versions.salt(options),
            continues=request.generated + call.max_tokens < request.end,
        )

    def _kinship(self, call: Call) -> dict[str, str]:
        """What an engine that drafts is told: whose sibling the request is, and whether its tokens are urgent.

        A response that began again under other weights, or another adapter, is another sequence.
        """
        request = call.request
        urgent = self._buffer.in_tail or self._policy.is_probe(request)
        return {
            "seer_group": f"{self._run}/{request.group.id}",
            "seer_request": f"{request.index}@{call.weight_version}{self._versions.lineage(request.group.options)}",
            "seer_priority": "high" if urgent else "low",
        }
