"""A socket to the draft server: one request at a time, and its reply or None.

Invariants: without a server nothing is queued and nothing waits longer than its timeout; ZMQ connects again by itself;
replies that come too late are recognised by their serial number and thrown away. For one thread only.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec
import zmq

from seer_servers.drafting.wire import MAX_MESSAGE, AskStats, Stats, encoder, reply_decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seer_servers.drafting.wire import Reply, Request

REPLY_TIMEOUT_S = 2.0
OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,  # nothing is queued for a server that is away
    zmq.SNDHWM: 4,
    zmq.RCVHWM: 4,
    zmq.MAXMSGSIZE: MAX_MESSAGE,
    zmq.RECONNECT_IVL: 100,  # ms
    zmq.RECONNECT_IVL_MAX: 1000,
    zmq.HEARTBEAT_IVL: 2000,  # finds out that the server's machine is gone
}


class Link:
    """The socket, while it is open, and what went through it."""

    def __init__(self) -> None:
        self.connected = False  # the last request was answered
        self.messages = 0
        self.timeouts = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self.largest_out = 0
        self.largest_in = 0
        self._socket: zmq.Socket[bytes] | None = None

    @contextlib.contextmanager
    def open(self, address: str) -> Iterator[None]:
        """Have a socket to `address`; raises zmq.ZMQError if that is no address."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            for option, value in OPTIONS.items():
                socket.setsockopt(option, value)
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.connect(address)
            self._socket = socket
            yield
        self._socket = None

    def exchange(self, request: Request, *, connect_s: float = 0.0) -> Reply | None:
        """Send a request and return its reply; None if no server is there within `connect_s`, or does not answer."""
        assert self._socket is not None, "open() comes first"
        message = encoder.encode(request)
        self.connected = self._send(self._socket, message, connect_s)
        reply = self._reply(self._socket, request.serial) if self.connected else None
        self.timeouts += self.connected and reply is None
        self.connected = reply is not None
        return reply

    def _send(self, socket: zmq.Socket[bytes], message: bytes, connect_s: float) -> bool:
        if not socket.poll(int(connect_s * 1000), zmq.POLLOUT):
            return False
        try:
            socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.messages += 1
        self.bytes_out += len(message)
        self.largest_out = max(self.largest_out, len(message))
        return True

    def _reply(self, socket: zmq.Socket[bytes], serial: int) -> Reply | None:
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0 and socket.poll(int(left * 1000) + 1):
            message = b"".join(socket.recv_multipart())
            self.bytes_in += len(message)
            self.largest_in = max(self.largest_in, len(message))
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                reply = reply_decoder.decode(message)
                if reply.serial == serial:
                    return reply
        return None


def ask_stats(address: str, *, connect_s: float = REPLY_TIMEOUT_S) -> Stats | None:
    """The counts of the server at `address`; None if there is none, or it does not answer."""
    link = Link()
    with link.open(address):
        reply = link.exchange(AskStats(serial=1), connect_s=connect_s)
    return reply if isinstance(reply, Stats) else None
