"""Ports that are kept: nobody is given them by chance, and the servers that they are meant for get them."""

from __future__ import annotations

import gc
import socket

import pytest

from seer_servers.ports import HOST, Ports


def bound(port: int, *, reuse: bool) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    made.bind((HOST, port))
    return made


def test_they_differ() -> None:
    assert len(set(Ports(50))) == 50


@pytest.mark.parametrize("reuse", [False, True])
def test_who_asks_for_any_port_is_not_given_one(reuse: bool) -> None:
    ports = Ports(100)
    for _ in range(5000):
        with bound(0, reuse=reuse) as other:
            assert other.getsockname()[1] not in ports


def test_who_connects_is_refused_and_takes_none() -> None:
    ports = Ports(100)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, ports[0]), 5)
    with socket.create_server((HOST, 0)) as server:
        for _ in range(1000):
            with socket.create_connection(server.getsockname(), 60) as client, server.accept()[0]:
                assert client.getsockname()[1] not in ports


def test_a_server_listens_again_and_again_and_only_one() -> None:
    ports = Ports(1)
    for _ in range(2):
        with socket.create_server((HOST, ports[0])) as server:
            with socket.create_connection((HOST, ports[0]), 60) as client, server.accept()[0] as accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
            with pytest.raises(OSError, match="in use"):
                socket.create_server((HOST, ports[0]))


def test_they_are_kept_as_long_as_the_list_lives() -> None:
    ports = Ports(1)
    (port,) = ports
    with pytest.raises(OSError, match="in use"):
        bound(port, reuse=False)
    del ports
    gc.collect()
    bound(port, reuse=False).close()
