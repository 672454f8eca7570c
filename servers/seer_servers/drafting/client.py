"""A process's line to the draft server: hand over tokens and groups, take what others have added, never wait.

Everything that takes time happens in one daemon thread, which owns the socket and a `Replica`. Invariants: no call here
blocks or raises, whether the server is there, away or new; the thread goes on, whatever a server sends; queues are
bounded, and what they cannot hold is counted; a process that was forked or spawned gets a thread and a replica of its
own, with its first call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from seer_servers.drafting.address import ADDRESS_ENV, check_address
from seer_servers.drafting.link import Link
from seer_servers.drafting.replica import Increment, Replica

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DraftClient", "Increment", "drafter_client"]

BATCH_S = 0.025  # additions wait this long at most for company
FETCH_S = 0.05  # between two fetches while tokens flow
IDLE_FETCH_S = 0.5  # and when none do
DRAFTER_BATCH_S, DRAFTER_FETCH_S = 0.1, 0.2  # in an engine's drafter: the thread takes its time from the engine's core
MAX_INBOX = 65_536  # additions: hundreds of steps of a batch of 256
MAX_OUTBOX = 16_384  # increments that nobody took; then nothing is fetched until somebody does
SWEEP_S = 5.0

logger = logging.getLogger("vllm.seer")  # it runs in vLLM's processes, and is of use without vLLM


class DraftClient:
    """One process's client; `name` names its thread. What is handed over must not be changed afterwards.

    Raises:
        ConfigError: `address` is none.
    """

    def __init__(self, address: str, *, name: str, batch_s: float = BATCH_S, fetch_s: float = FETCH_S) -> None:
        check_address(address, anywhere=True)
        self._address = address
        self._name = name
        self._batch_s = batch_s
        self._fetch_s = fetch_s
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        """Have nothing but the settings, as at first or in a process that has just been forked."""
        self._inbox: deque[tuple[str, str, int, Sequence[int]]] = deque()
        self._groups: deque[tuple[str, float]] = deque()
        self._outbox: deque[Increment] = deque()
        self._wants = False
        self._dropped = 0
        self._failures = 0
        self._cpu_s = 0.0
        self._link = Link()
        self._replica = Replica()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """A spawned process gets a client that is as good as new."""
        return _remade, (self._address, self._name, self._batch_s, self._fetch_s)

    def register_group(self, group: str, ttl_s: float) -> None:
        """Share this group, for `ttl_s` seconds after its last use."""
        if self._thread is None:
            self._start()
        if len(self._groups) < MAX_INBOX:
            self._groups.append((group, ttl_s))
        else:
            self._dropped += 1

    def update(self, group: str, request: str, prev_token_count: int, new_tokens: Sequence[int]) -> None:
        """Add `new_tokens` to a request, of which `prev_token_count` tokens came before. Any thread may call."""
        if self._thread is None:
            self._start()
        if len(self._inbox) < MAX_INBOX:
            self._inbox.append((group, request, prev_token_count, new_tokens))
        else:
            self._dropped += 1

    def fetched(self) -> list[Increment]:
        """What others have added to our groups since the last call. A process that never calls this fetches nothing."""
        if self._thread is None:
            self._start()
        self._wants = True
        return [self._outbox.popleft() for _ in range(len(self._outbox))]

    def stats(self) -> dict[str, int | float]:
        """Counts since this process began to use the client; names begin with `sync_`, sizes are in bytes.

        `sync_connected` is 1 while the server answers; `sync_boots` the lives of the server that were met;
        `sync_dropped` additions that found the queue full, `sync_invalid` that made no sense, `sync_gaps` that began
        behind what is known; `sync_malformed` what the server sent that are no tokens; `sync_failures` errors of the
        thread; `sync_refused` tokens without room in this process; `sync_cpu_s` the thread's CPU time.
        """
        link, replica = self._link, self._replica
        return {
            "sync_connected": int(link.connected),
            "sync_boots": replica.boots,
            "sync_groups": len(replica.logs),
            "sync_bytes": replica.logs.nbytes,
            "sync_sent_tokens": replica.sent_tokens,
            "sync_fetched_tokens": replica.fetched_tokens,
            "sync_dropped": self._dropped,
            "sync_invalid": replica.invalid,
            "sync_gaps": replica.gaps,
            "sync_malformed": replica.malformed,
            "sync_failures": self._failures,
            "sync_refused": replica.logs.refused_tokens,
            "sync_messages": link.messages,
            "sync_timeouts": link.timeouts,
            "sync_bytes_out": link.bytes_out,
            "sync_bytes_in": link.bytes_in,
            "sync_largest_out": link.largest_out,
            "sync_largest_in": link.largest_in,
            "sync_cpu_s": self._cpu_s,
        }

    def close(self) -> None:
        """Tell the thread to end; what is called afterwards does nothing."""
        self._ended.set()
        self._inbox = deque(maxlen=0)
        self._groups = deque(maxlen=0)
        self._thread = self._thread or threading.current_thread()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"seer-drafts-{self._name}", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        pace = _Pace(self._fetch_s)
        swept = time.monotonic()
        with self._link.open(self._address):
            while not self._ended.wait(self._batch_s):
                try:
                    self._round(pace)
                except Exception:
                    self._failures += 1
                    if self._failures == 1:  # the same may come again with every round
                        logger.exception("Seer drafting: an exchange with the draft server failed; it is tried again.")
                if time.monotonic() - swept > SWEEP_S:
                    self._replica.expire()
                    swept = time.monotonic()
                self._cpu_s = time.thread_time()

    def _round(self, pace: _Pace) -> None:
        if pace.due() and len(self._outbox) < MAX_OUTBOX:
            self._replica.ask(fetch=self._wants)
        taken, news = self._take(), self._exchange()
        pace.flows = taken or news

    def _take(self) -> bool:
        """Move what was handed over into the replica; whether there was anything."""
        groups, additions = len(self._groups), len(self._inbox)
        for _ in range(groups):
            self._replica.register(*self._groups.popleft())
        for _ in range(additions):
            self._replica.take(*self._inbox.popleft())
        return bool(groups or additions)

    def _exchange(self) -> bool:
        """Say and ask everything that there is; whether others have added anything."""
        news = False
        while (request := self._replica.next_request()) is not None and not self._ended.is_set():
            reply = self._link.exchange(request)
            if reply is None:
                break
            increments = self._replica.learn(request, reply)
            self._outbox.extend(increments)
            news = news or bool(increments)
        return news


class _Pace:
    """When to fetch: often while tokens flow, less and less often when none do."""

    def __init__(self, fetch_s: float) -> None:
        self.flows = True
        self._shortest = self._interval = fetch_s
        self._last = 0.0

    def due(self) -> bool:
        """Whether it is time to fetch; then the next interval begins."""
        self._interval = self._shortest if self.flows else self._interval
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        self._interval = min(2 * self._interval, max(IDLE_FETCH_S, self._shortest))
        return True


def _remade(address: str, name: str, batch_s: float, fetch_s: float) -> DraftClient:
    return DraftClient(address, name=name, batch_s=batch_s, fetch_s=fetch_s)


_clients: weakref.WeakSet[DraftClient] = weakref.WeakSet()


def _forked() -> None:
    for client in _clients:
        client._begin()  # noqa: SLF001 - its own module


os.register_at_fork(after_in_child=_forked)


def drafter_client() -> DraftClient | None:
    """The client of this engine's drafter, if the engine has a draft server."""
    address = os.environ.get(ADDRESS_ENV)
    if not address:
        return None
    return DraftClient(address, name=f"engine-{os.getpid()}", batch_s=DRAFTER_BATCH_S, fetch_s=DRAFTER_FETCH_S)
