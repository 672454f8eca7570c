"""Addresses to listen on: whether one is free, asked before anything expensive is started."""

from __future__ import annotations

import os
import socket

from seer_async.errors import UsageError


def require_free(host: str, port: int) -> None:
    """Listen for a moment; port 0 stands for any free one.

    Raises:
        UsageError: Nobody can listen there now; says why and what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    """The same in words; event loops put several sentences around what the system says."""
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
    return UsageError(f"cannot listen on {host}:{port}: {why}; choose another --port, or another --host")
