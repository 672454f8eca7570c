"""The draft server: all tokens of all groups, from all engines, for any of them to fetch what it lacks.

It keeps positional token logs and looks at no token; each engine builds its own index. Off every critical path: one
that is killed and started again is empty, and its clients fill it again. `python -m seer_servers.drafting.server` runs
it in the foreground until SIGTERM or SIGINT.

Invariants: whatever a peer sends, the server goes on; memory is bounded by `TokenLogs` and a few messages a peer; it
listens on a socket file that only its user reaches, or on the loopback interface, unless told otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
import uuid
from typing import TYPE_CHECKING

import msgspec
import zmq

from seer_async.errors import FleetError, SeerError
from seer_servers.drafting.address import check_address, prepared
from seer_servers.drafting.tokenlog import MAX_TOKENS, Outcome, TokenLogs
from seer_servers.drafting.wire import (
    BATCH_TOKENS,
    MAX_MESSAGE,
    TOKEN_BYTES,
    AskStats,
    Counts,
    Deltas,
    Done,
    Fetch,
    Fetched,
    Register,
    Reply,
    Request,
    Stats,
    Update,
    encoder,
    request_decoder,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SWEEP_S = 1.0
QUEUED = 4  # messages to or from one peer; our clients wait for each reply
HEARTBEAT_MS = 5000


class DraftServer:
    """Answers requests; has nothing to do with sockets."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.boot = uuid.uuid4().hex
        self.logs = TokenLogs(max_tokens)
        self.malformed = 0
        self._registrations = 0
        self._updates = 0
        self._fetches = 0
        self._duplicates = 0
        self._gaps = 0
        self._started = time.monotonic()

    def answer(self, message: bytes) -> bytes | None:
        """The reply to a message; None to one that makes no sense, which is only counted."""
        try:
            request = request_decoder.decode(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.malformed += 1
            return None
        return encoder.encode(self.handle(request))

    def handle(self, request: Request) -> Reply:
        """The reply to a request."""
        match request:
            case Update():
                return self._update(request)
            case Fetch():
                return self._fetch(request)
            case Register():
                return self._register(request)
            case AskStats():
                return self._stats(request)

    def _register(self, request: Register) -> Done:
        self._registrations += len(request.ttls)
        for group, ttl_s in request.ttls.items():
            self.logs.register(group, ttl_s)
        return Done(request.serial, self.boot)

    def _update(self, request: Update) -> Done:
        have: Counts = {}
        full: dict[str, list[str]] = {}
        for group, deltas in request.deltas.items():
            self._updates += len(deltas)
            for name, (position, data) in deltas.items():
                outcome = self._append(group, name, position, data)
                if outcome is Outcome.GAP:
                    have.setdefault(group, {})[name] = self.logs.length(group, name)
                elif outcome is Outcome.FULL:
                    full.setdefault(group, []).append(name)
        return Done(request.serial, self.boot, have, full)

    def _append(self, group: str, name: str, position: int, data: bytes) -> Outcome:
        if len(data) % TOKEN_BYTES:
            self.malformed += 1
            return Outcome.KNOWN
        outcome = self.logs.append(group, name, position, data)
        self._gaps += outcome is Outcome.GAP
        self._duplicates += outcome is Outcome.KNOWN
        return outcome

    def _fetch(self, request: Fetch) -> Fetched:
        self._fetches += 1
        deltas: Deltas = {}
        room = BATCH_TOKENS
        for group, name, position in self._news(request.known):
            if room <= 0:
                break
            data = self.logs.since(group, name, position, room)
            deltas.setdefault(group, {})[name] = position, data
            room -= len(data) // TOKEN_BYTES + len(group) + len(name)
        return Fetched(request.serial, self.boot, deltas, more=room <= 0)

    def _news(self, known: Counts) -> Iterator[tuple[str, str, int]]:
        for group, counts in known.items():
            for name, log in self.logs.logs(group).items():
                position = counts.get(name, 0)
                if len(log) > position * TOKEN_BYTES:
                    yield group, name, position

    def _stats(self, request: AskStats) -> Stats:
        return Stats(
            request.serial,
            self.boot,
            groups=len(self.logs),
            requests=self.logs.requests,
            tokens=self.logs.tokens,
            bytes=self.logs.nbytes,
            registrations=self._registrations,
            updates=self._updates,
            fetches=self._fetches,
            duplicates=self._duplicates,
            gaps=self._gaps,
            expired=self.logs.expired,
            evicted=self.logs.evicted,
            dropped_tokens=self.logs.dropped_tokens,
            refused_tokens=self.logs.refused_tokens,
            malformed=self.malformed,
            uptime_s=time.monotonic() - self._started,
            cpu_s=time.process_time(),
        )


def serve(server: DraftServer, router: zmq.Socket[bytes]) -> None:
    """Answer whoever writes to `router`, until a signal's handler raises."""
    swept = time.monotonic()
    while True:
        if router.poll(int(SWEEP_S * 1000)):
            _answer_one(server, router)
        if time.monotonic() - swept > SWEEP_S:
            server.logs.expire()
            swept = time.monotonic()


def _answer_one(server: DraftServer, router: zmq.Socket[bytes]) -> None:
    peer, *frames = router.recv_multipart()
    if len(frames) != 1:
        server.malformed += 1
    elif (reply := server.answer(frames[0])) is not None:
        with contextlib.suppress(zmq.Again):  # a peer that asks and does not read
            router.send_multipart((peer, reply), zmq.NOBLOCK)


def run(address: str, *, max_tokens: int = MAX_TOKENS, anywhere: bool = False) -> None:
    """Serve at `address` until SIGTERM or SIGINT; says so on standard output when it listens.

    Raises:
        ConfigError: The address is not one to listen on.
        FleetError: It is taken.
    """
    check_address(address, anywhere=anywhere)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    with zmq.Context() as context, prepared(address), context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        router.setsockopt(zmq.RCVHWM, QUEUED)
        router.setsockopt(zmq.SNDHWM, QUEUED)
        router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.setsockopt(zmq.IPV6, int("[" in address))
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise FleetError(
                f"the draft server cannot listen at {address}: {error.strerror}; choose another"
            ) from error
        print(f"draft server ready at {address}", flush=True)  # noqa: T201 - for the terminal and the log
        with contextlib.suppress(SystemExit):
            serve(DraftServer(max_tokens), router)


def _end(*_: object) -> None:
    sys.exit()


def main() -> int:
    """Run the server that the command line describes."""
    parser = argparse.ArgumentParser(description="Run Seer's draft server.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--anywhere", action="store_true")
    options = parser.parse_args()
    try:
        run(options.address, max_tokens=options.max_tokens, anywhere=options.anywhere)
    except SeerError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
