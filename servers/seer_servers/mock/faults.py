"""Which calls to a mock engine go wrong, and how.

A fault is a takeover (it answers in the place of generation), an edit (it changes the honest reply) or a delivery (it
sends the honest reply's bytes in a hostile way). Which calls meet a fault is drawn from a seeded source, so the same
calls in the same order meet the same faults.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from random import Random
from typing import TYPE_CHECKING, TypeVar

import msgspec

from seer_async.errors import ConfigError
from seer_servers.mock import fault_http, fault_reply
from seer_servers.mock.fault_reply import Body, Scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_KEPT_REPLIES = 16

_F = TypeVar("_F", bound="Callable[..., object]")


def _by_name(faults: Iterable[_F]) -> dict[str, _F]:
    return {fault.__name__.replace("_", "-"): fault for fault in faults}


TAKEOVERS = _by_name(fault_http.TAKEOVERS)
EDITS = _by_name(fault_reply.EDITS)
DELIVERIES = _by_name(fault_http.DELIVERIES)

DESCRIPTIONS = {
    name: (fault.__doc__ or "").partition("\n")[0]
    for name, fault in sorted({**TAKEOVERS, **EDITS, **DELIVERIES}.items())
}
"""What each fault does, by the name it is switched on with."""


class Faults:
    """Which faults are on, with which probability, and how often each has struck."""

    def __init__(self, seed: int) -> None:
        self.active: dict[str, float] = {}
        self.fired: Counter[str] = Counter()
        self._random = Random(f"faults {seed}")  # noqa: S311 - which call meets a fault is no secret
        self._replies: deque[tuple[str, str, bytes]] = deque(maxlen=_KEPT_REPLIES)

    def switch(self, active: Mapping[str, float]) -> None:
        """Replace the faults that are on; raises ConfigError for an unknown name or a value that is no probability."""
        for name, probability in active.items():
            if name not in DESCRIPTIONS:
                raise ConfigError(f"there is no fault {name!r}; the faults are {', '.join(DESCRIPTIONS)}")
            if not 0 <= probability <= 1:
                raise ConfigError(f"the probability of {name} must be from 0 to 1, not {probability}")
        self.active = dict(active)

    def draw(self) -> str | None:
        """The fault that the next call meets: the first active one that its own draw selects."""
        for name, probability in self.active.items():
            if self._random.random() < probability:
                self.fired[name] += 1
                return name
        return None

    def remember(self, route: str, call: str, payload: bytes) -> None:
        """Keep an honest reply for faults that repeat one; costs nothing while no fault is on."""
        if self.active:
            self._replies.append((route, call, payload))

    def older(self, route: str, call: str) -> Body | None:
        """A remembered reply of this route to another call."""
        others = [payload for kept, other, payload in self._replies if kept == route and other != call]
        return msgspec.json.decode(self._random.choice(others), type=Body) if others else None


def parse_fault(text: str) -> tuple[str, float]:
    """Split NAME[:PROBABILITY]; without a probability the fault always strikes."""
    name, _, probability = text.partition(":")
    try:
        return name, float(probability or 1)
    except ValueError:
        raise ConfigError(f"--fault {text}: write NAME or NAME:PROBABILITY, as in hang:0.01") from None


def apply_edit(name: str, payload: bytes, scene: Scene) -> bytes:
    """Edit a reply; not msgspec's JSON, which would write NaN as null."""
    return json.dumps(EDITS[name](msgspec.json.decode(payload, type=Body), scene)).encode()
