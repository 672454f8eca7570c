"""Where a draft server may listen: a socket file in a folder of one's own, or a TCP port.

Invariants: the folder of a socket file has mode 700, so only its user reaches the server; nobody's socket is taken
away; ports that other machines reach are for whoever says so.
"""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from seer_async.errors import ConfigError, FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS_ENV = "SEER_DRAFT_SERVER"  # tells an engine its draft server
_SOCKET_PATH_BYTES = 107  # the kernel's limit


def socket_path(address: str) -> Path | None:
    """Where an ipc address has its socket; None for other transports."""
    return Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None


def check_address(address: str, *, anywhere: bool = False) -> None:
    """Check that a server may listen there: a socket file, or a loopback TCP port, or any port with `anywhere`.

    Raises:
        ConfigError: It may not, or is no address; says what to do.
    """
    path = socket_path(address)
    if path is not None:
        _check_path(path)
        return
    host, port = _host_and_port(address)
    if not port:
        raise ConfigError(f"draft server address {address}: it must be ipc:///FOLDER/NAME or tcp://HOST:PORT")
    if not anywhere and not _is_loopback(host):
        raise ConfigError(
            f"draft server address {address} can be reached from other machines, and whoever reaches it can read and "
            "add tokens: use tcp://127.0.0.1:PORT, or --anywhere on a network that you trust"
        )


@contextlib.contextmanager
def prepared(address: str) -> Iterator[None]:
    """Have a private folder for an address's socket file: made if it is missing, and then removed again.

    Raises:
        ConfigError: Others can reach the folder, or it cannot be made.
        FleetError: A server listens there.
    """
    path = socket_path(address)
    if path is None:
        yield
        return
    made = _make_private(path.parent)
    if _somebody_listens(path):
        raise FleetError(f"another draft server listens at ipc://{path}: use that one, or another address")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody has put something else there
                path.parent.rmdir()


def _make_private(folder: Path) -> bool:
    """Make the folder, or check that it is ours alone; whether it was made."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(
                f"others can reach {folder}: put the draft server's socket into a folder of yours with mode 700"
            ) from None
        return False
    except OSError as error:
        raise ConfigError(f"the draft server cannot make the folder {folder}: {error.strerror}") from error
    return True


def _check_path(path: Path) -> None:
    if not path.is_absolute():
        raise ConfigError(f"draft server address ipc://{path}: the path must be absolute, as in ipc:///run/seer/drafts")
    if len(bytes(path)) > _SOCKET_PATH_BYTES:
        raise ConfigError(
            f"draft server address ipc://{path}: the path is longer than {_SOCKET_PATH_BYTES} bytes, which is the "
            "kernel's limit: choose a shorter one"
        )


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        url = urllib.parse.urlsplit(address)
        host, port = url.hostname or "", url.port or 0
    except ValueError:
        return "", 0
    return (host, port) if url.scheme == "tcp" else ("", 0)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _somebody_listens(path: Path) -> bool:
    """Whether a process has a socket file open: ZMQ would take it away from it without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
