"""A service in one process and in virtual time: a core that lasts, and clients that come and go.

Invariant: a group is joined only while it is open, as the service does it, so no request's id is used again. The world
ends when every response that was ever asked for is a sample; nothing is resumed, because a service is not.
"""

from __future__ import annotations

import random
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.events import (
    AbortRequested,
    EngineHeld,
    GroupAdded,
    HandBackRequested,
    Paused,
    RequestsCancelled,
    Resumed,
)
from seer_async.testing.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.events import Event


class WishKind(StrEnum):
    """What clients of a service may want."""

    SUBMIT = "submit"  # a group, or more responses to it while it is open
    CANCEL = "cancel"  # some open requests
    HAND_BACK = "hand_back"  # some open requests, as far as they have got; they are cancelled after `seconds`
    PAUSE = "pause"  # for `seconds`
    HOLD = "hold"  # an engine, for `seconds`


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """One wish, due at the virtual time `at`; `group` is what to submit, `engine` what to hold."""

    at: float
    kind: WishKind
    group: GroupAdded | None = None
    engine: str = ""
    count: int = 0  # of requests to cancel or to hand back, at most
    seconds: float = 0.0


class LastingWorld(World):
    """A world whose work is `wishes`."""

    lasting = True

    def __init__(self, *args: Any, wishes: Sequence[Wish], **options: Any) -> None:
        super().__init__(*args, **options)
        self._wishes = wishes
        self._pending = len(wishes)
        self._names: dict[str, str] = {}  # of the latest group, by the id that is wished for
        self._choices = random.Random(f"wishes {self._seed}")  # noqa: S311 - a simulation must repeat itself

    def finish(self) -> None:
        """Run until all wishes are over and every response is a sample."""
        reason = self.run()
        assert reason == "aborted", f"a service ends by itself: {reason}"

    def _give_work(self, emitted: set[str]) -> None:
        del emitted
        for wish in self._wishes:
            self.clock.after(wish.at - self.clock.now, partial(self._grant, wish))

    def _grant(self, wish: Wish) -> None:
        match wish.kind:
            case WishKind.SUBMIT:
                assert wish.group is not None
                self.post(self._named(wish.group))
            case WishKind.CANCEL:
                self.post(RequestsCancelled(requests=self._some(wish.count)))
            case WishKind.HAND_BACK:
                requests = self._some(wish.count)
                self.post(HandBackRequested(requests=requests))
                self._later(wish, RequestsCancelled(requests=requests))
            case WishKind.PAUSE:
                self.post(Paused())
                self._later(wish, Resumed())
            case WishKind.HOLD:
                self.post(EngineHeld(engine=wish.engine, held=True))
                self._later(wish, EngineHeld(engine=wish.engine, held=False))
        self._granted()

    def _later(self, wish: Wish, event: Event) -> None:
        self._pending += 1

        def happen() -> None:
            self.post(event)
            self._granted()

        self.clock.after(wish.seconds, happen)

    def _granted(self) -> None:
        self._pending -= 1
        self._end_if_complete()

    def post(self, event: Event) -> None:
        """Tell the service; when nobody wants anything any more, end it."""
        super().post(event)
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if not self._pending and self._ended is None and self.samples.keys() == self.audit.accounts.keys():
            super().post(AbortRequested())

    def _named(self, group: GroupAdded) -> GroupAdded:
        """The group under its name if that is open, or under a new one."""
        wanted = group.prompt.id
        if self._names.get(wanted) not in self.core.buffer.groups:
            self._names[wanted] = f"{wanted}.{self.events}"
        prompt = msgspec.structs.replace(group.prompt, id=self._names[wanted])
        return msgspec.structs.replace(group, prompt=prompt)

    def _some(self, count: int) -> tuple[str, ...]:
        requests = [request.id for request in self.core.buffer.unfinished()]
        return tuple(self._choices.sample(requests, min(count, len(requests))))
