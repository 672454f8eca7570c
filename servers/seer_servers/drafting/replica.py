"""A client's copy of its groups' token logs, and what it has to tell and ask the server to keep both alike.

No thread and no socket in here: `take` what the process adds, send each `next_request`, `learn` from its reply. A
request whose reply never comes is simply made again later, because every message can be repeated without harm.

Invariants: what this process added is sent until the server has it, and again if the server says that it has less, or
has forgotten everything (a new `boot`); what the server sends is handed over once, and never what this process added.
"""

from __future__ import annotations

import struct
import time
from itertools import islice
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seer_servers.drafting.tokenlog import MAX_TOKENS, Outcome, TokenLogs
from seer_servers.drafting.wire import (
    BATCH_TOKENS,
    MAX_COUNT,
    MAX_TTL_S,
    TOKEN_BYTES,
    Counts,
    Deltas,
    Done,
    Fetch,
    Fetched,
    Register,
    Reply,
    Request,
    Update,
    is_name,
    pack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

REGISTERED_AT_ONCE = 2048  # groups in one message
REREGISTER = 1 / 3  # of the time to live: no sooner does the server hear of a group again


class Increment(NamedTuple):
    """Tokens, int32 [n], that another process added to a request, from position `prev_token_count` on."""

    group: str
    request: str
    prev_token_count: int
    tokens: NDArray[np.int32]


class Replica:
    """One client's state; `clock` is in seconds."""

    def __init__(self, max_tokens: int = MAX_TOKENS, clock: Callable[[], float] = time.monotonic) -> None:
        self.logs = TokenLogs(max_tokens, clock)
        self.invalid = 0  # additions with impossible names, positions or tokens
        self.gaps = 0  # additions that began behind what is known
        self.malformed = 0  # increments from the server that are no tokens
        self.boots = 0  # lives of the server that were met
        self.sent_tokens = 0
        self.fetched_tokens = 0
        self._clock = clock
        self._boot = ""
        self._serial = 0
        self._sent: dict[str, dict[str, int]] = {}  # of what this process added: tokens that the server has
        self._dirty: dict[tuple[str, str], None] = {}  # requests with tokens that it lacks, oldest first
        self._ttls: dict[str, float] = {}  # registered here
        self._registered: dict[str, float] = {}  # when the server was last told
        self._untold: dict[str, float] = {}  # times to live that it must be told
        self._full: set[tuple[str, str]] = set()  # requests for which there is no room, here or there
        self._asking: list[str] = []  # groups to fetch
        self._ask = False

    def register(self, group: str, ttl_s: float) -> None:
        """Keep a group here and on the server for `ttl_s` seconds after its last use."""
        if not is_name(group) or not 0 < ttl_s <= MAX_TTL_S:
            self.invalid += 1
            return
        self.logs.register(group, ttl_s)
        self._ttls[group] = max(ttl_s, self._ttls.get(group, 0.0))
        told = self._registered.get(group)
        if told is None or self._clock() - told > ttl_s * REREGISTER:
            self._untold[group] = self._ttls[group]

    def take(self, group: str, request: str, position: int, tokens: Sequence[int]) -> None:
        """Add tokens of this process's own."""
        try:
            start, data = index(position), pack(tokens)
        except (struct.error, TypeError):
            start, data = 0, b""
        if not data or not 0 <= start <= MAX_COUNT or not is_name(group) or not is_name(request):
            self.invalid += 1
            return
        outcome = self.logs.append(group, request, start, data)
        if outcome is Outcome.ADDED:
            self._sent.setdefault(group, {}).setdefault(request, 0)
            self._dirty[group, request] = None
        elif outcome is Outcome.GAP:
            self.gaps += 1

    def ask(self, *, fetch: bool) -> None:
        """Make the next requests fetch what others have added; without `fetch`, only see whether the server lives."""
        self._asking = list(self.logs) if fetch else []
        self._ask = True

    def next_request(self) -> Request | None:
        """What to send now: registrations, then additions, then what `ask` asked for; None if there is nothing."""
        self._serial += 1
        if self._untold:
            return Register(self._serial, dict(islice(self._untold.items(), REGISTERED_AT_ONCE)))
        if deltas := self._unsent():
            return Update(self._serial, deltas)
        return Fetch(self._serial, self._known()) if self._ask else None

    def learn(self, request: Request, reply: Reply) -> list[Increment]:
        """Learn from the reply to a request; returns what others have added."""
        if reply.boot != self._boot:
            self._meet(reply.boot)
        match request, reply:
            case Register(), Done():
                self._told(request)
            case Update(), Done():
                self._arrived(request, reply)
            case Fetch(), Fetched():
                return self._take_in(request, reply)
        return []

    def expire(self) -> None:
        """Forget groups whose time is over; call it now and then."""
        self.logs.expire()
        tables: tuple[dict[str, Any], ...] = (self._sent, self._ttls, self._registered, self._untold)
        for table in tables:
            for group in [group for group in table if group not in self.logs]:
                del table[group]
        self._full = {(group, request) for group, request in self._full if group in self.logs}

    def _unsent(self) -> Deltas:
        deltas: Deltas = {}
        room = BATCH_TOKENS
        for group, request in list(self._dirty):
            if room <= 0:
                break
            sent, data = self._tail(group, request, room)
            if data:
                deltas.setdefault(group, {})[request] = sent, data
                room -= len(data) // TOKEN_BYTES + len(group) + len(request)
            else:
                del self._dirty[group, request]
        return deltas

    def _tail(self, group: str, request: str, most: int) -> tuple[int, bytes]:
        """What the server lacks of a request, and from which position on."""
        sent = self._sent.get(group, {}).get(request)
        if sent is None or (group, request) in self._full:
            return 0, b""
        return sent, self.logs.since(group, request, sent, most)

    def _known(self) -> Counts:
        """What we have of the next groups to ask for, as many as one message may name; of full requests, everything."""
        known: Counts = {}
        room = BATCH_TOKENS
        while self._asking and room > 0:
            group = self._asking.pop()
            if group not in self.logs:
                continue
            known[group] = {request: len(log) // TOKEN_BYTES for request, log in self.logs.logs(group).items()}
            room -= len(group) + sum(map(len, known[group])) + len(known[group])
        for group, request in self._full:
            if group in known:
                known[group][request] = MAX_COUNT
        return known

    def _meet(self, boot: str) -> None:
        """A new life of the server: it has nothing that we sent, and knows no group."""
        self._boot = boot
        self.boots += 1
        self._full.clear()
        self._registered.clear()
        self._untold = dict(self._ttls)
        for group, requests in self._sent.items():
            for request in requests:
                requests[request] = 0
                self._dirty[group, request] = None

    def _told(self, register: Register) -> None:
        for group in register.ttls:
            self._registered[group] = self._clock()
            self._untold.pop(group, None)

    def _arrived(self, update: Update, reply: Done) -> None:
        self._full.update((group, request) for group, requests in reply.full.items() for request in requests)
        for group, deltas in update.deltas.items():
            have = reply.have.get(group, {})
            sent = self._sent.get(group, {})
            for request, (position, data) in deltas.items():
                count = len(data) // TOKEN_BYTES
                self.sent_tokens += count
                if request in sent:  # else the group has expired meanwhile
                    sent[request] = have.get(request, position + count)

    def _take_in(self, fetch: Fetch, reply: Fetched) -> list[Increment]:
        self._asking += fetch.known if reply.more else ()
        self._ask = bool(self._asking)
        news = [
            self._added(group, request, position, data)
            for group, requests in reply.deltas.items()
            for request, (position, data) in requests.items()
        ]
        return [increment for increment in news if increment is not None]

    def _added(self, group: str, request: str, position: int, data: bytes) -> Increment | None:
        if len(data) % TOKEN_BYTES:
            self.malformed += 1
            return None
        have = self.logs.length(group, request)
        outcome = self.logs.append(group, request, position, data)
        if outcome is Outcome.FULL:
            self._full.add((group, request))
        if outcome is not Outcome.ADDED:
            return None
        tokens = np.frombuffer(data, "<i4")[have - position :].astype(np.int32)
        self.fetched_tokens += len(tokens)
        return Increment(group, request, have, tokens)
