"""TCP ports for servers that start later.

A port that was free a moment ago may be somebody else's when its server comes to listen. So each is kept by a socket
that is bound and does not listen: who asks for any port, or connects to somewhere, is not given it, and who connects to
it is refused. The server that it is meant for sets SO_REUSEADDR, as servers do, and listens beside that socket, again
after a restart too.
"""

from __future__ import annotations

import socket
import weakref

HOST = "127.0.0.1"


class Ports(list[int]):
    """`count` different ports of the loopback interface, kept for as long as this list lives."""

    def __init__(self, count: int) -> None:
        sockets = [socket.socket() for _ in range(count)]
        weakref.finalize(self, _close, sockets)
        super().__init__(map(_keep, sockets))


def _keep(each: socket.socket) -> int:
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    each.bind((HOST, 0))
    port: int = each.getsockname()[1]
    return port


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
