"""How many files a process may have open: a call in flight, a client and a reader are a socket each."""

from __future__ import annotations

import contextlib
import resource


def raise_file_limit() -> None:
    """Allow this process and its children all that the system does; most shells begin with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
