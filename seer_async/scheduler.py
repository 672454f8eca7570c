"""The scheduler: which waiting request goes to which engine now, and what becomes of those that none may take.

Invariants: the policy proposes and places, nothing is sent to an engine that may not take it; while what should go next
fits nowhere, nothing goes, but for requests that are bound to engines which are full.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from seer_async.request import TERMINAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from seer_async.buffer import RequestBuffer
    from seer_async.calls import Calls
    from seer_async.instance import Instance
    from seer_async.policies import Policy
    from seer_async.request import Request
    from seer_async.responses import Responses
    from seer_async.versions import Versions

_SHORTEST_FIRST = 0.25  # of the usual length, a request's first chunk
_GOLDEN = 0.6180339887498949
_GROUP_STRIDE = 16  # between the numbers of one group's first requests and the next
_MOST_SKIPPED = 8  # requests set aside in one cycle because the only engines that may take them are full


class Scheduler:
    """From the Request Buffer to calls. `staggered` if first chunks are to be of different lengths."""

    def __init__(
        self,
        buffer: RequestBuffer,
        instances: Mapping[str, Instance],
        *,
        policy: Policy,
        versions: Versions,
        calls: Calls,
        responses: Responses,
        staggered: bool,
    ) -> None:
        self._buffer = buffer
        self._instances = instances
        self._policy = policy
        self._versions = versions
        self._calls = calls
        self._responses = responses
        self._staggered = staggered
        self.stranded: dict[Request, float] = {}  # since when no engine that is up could take them, in that order

    def schedule(self, now: float) -> None:
        """Send what may go now, until nothing waits or there is no room."""
        usable = self._usable(now)
        if not usable:
            return
        for instance in usable:
            instance.tick(now)
        skipped: list[Request] = []
        while (request := self._policy.choose()) is not None:
            bound = self._chunk_bound(request)
            tokens = request.length + bound
            instances = self._candidates(request, tokens, usable)
            if not instances:
                self._no_candidate(request, tokens, now)
                continue
            self.stranded.pop(request, None)
            if place := self._policy.place(request, tokens, instances):
                most = max(1, min(bound, request.end - request.generated))
                self._calls.send(request, place, tokens=tokens, most=most)
            elif len(instances) < len(usable) and len(skipped) < _MOST_SKIPPED:
                self._buffer.park(request)  # bound to engines that are full; others may still use the rest
                skipped.append(request)
            else:
                break  # no room: what goes first waits for it
        self._buffer.unpark(skipped)

    def could_go(self, request: Request) -> bool:
        """Whether an engine that is up may take the request, be it full, closed or held now, or after a restart."""
        if self._versions.outdated(request, [instance for instance in self._instances.values() if instance.up]):
            return True  # it begins again when its turn comes
        return bool(self._candidates(request, request.length + self._chunk_bound(request), self._current()))

    def review(self) -> None:
        """The fleet has got better: who could go now is not stranded any more."""
        self.stranded = {
            request: since
            for request, since in self.stranded.items()
            if request.state not in TERMINAL and not self.could_go(request)
        }

    def _usable(self, now: float) -> list[Instance]:
        return [instance for instance in self._current() if instance.usable(now)]

    def _current(self) -> list[Instance]:
        """Engines that are up and have the weights to sample from."""
        version = self._versions.required
        return [
            instance
            for instance in self._instances.values()
            if instance.up and (version is None or instance.version == version)
        ]

    def _candidates(self, request: Request, tokens: int, usable: Sequence[Instance]) -> list[Instance]:
        """Engines that may take the request, whether they have room now or not; never the one that just failed it."""
        fit = [instance for instance in usable if tokens <= instance.longest]
        if request.version is not None:
            version = request.version
            fit = [instance for instance in fit if instance.version == version or self._versions.fit(request, instance)]
        if request.rejected_by:
            fit = [instance for instance in fit if instance.name not in request.rejected_by]
        if request.avoid is not None:
            return [instance for instance in fit if instance.name != request.avoid] or fit
        return fit

    def _no_candidate(self, request: Request, tokens: int, now: float) -> None:
        """Nobody may take the request now: begin it again, give it up, or set it aside until the fleet changes."""
        ups = [instance for instance in self._instances.values() if instance.up]
        if self._versions.outdated(request, ups):
            self._responses.restart(request)
        elif len(ups) == len(self._instances) and not any(instance.could_hold(tokens) for instance in ups):
            error = f"too long: a sequence of {tokens} tokens does not fit any engine's KV cache"
            self._responses.fail(request, error)
        else:
            if not self.could_go(request):
                self.stranded.setdefault(request, now)
            self._buffer.park(request)

    def _chunk_bound(self, request: Request) -> int:
        """The most tokens the next chunk may add, as far as a policy may know.

        Requests that begin together should not ask for their next chunks together (see `occupancy`): their first
        chunks are of different lengths, spread evenly by the golden ratio.
        """
        options = request.group.options
        size = 0 if options.indivisible else options.chunk_size
        if not size or not self._policy.divided:
            return request.remaining
        if not request.generated and self._staggered:
            number = request.group.order * _GROUP_STRIDE + request.index
            size = math.ceil(size * (_SHORTEST_FIRST + (1 - _SHORTEST_FIRST) * (number * _GOLDEN % 1)))
        return min(size, request.remaining)
