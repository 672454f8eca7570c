"""The addresses of servers: what a base URL looks like, and when two of them name one server.

Invariant: two URLs with the same `canonical` form reach the same server; the reverse need not hold, so engines are also
compared by the process that answers (`EngineInfo.process`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from seer_async.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_EXAMPLE = "give a server's base URL, like http://10.0.0.1:8000"
_API = re.compile(r"/v1(/.*)?$")
_PORTS = {"http": 80, "https": 443}


def canonical(url: str) -> str:
    """A base URL in the form that is the same for all ways to write it.

    Raises:
        UsageError: It is no base URL; says what it should look like.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL ({error}): {_EXAMPLE}") from None
    if parts.scheme not in _PORTS or not parts.hostname or not url.isprintable() or " " in url:
        raise UsageError(f"{url!r} is no URL that starts with http:// or https://: {_EXAMPLE}")
    if parts.query or parts.fragment or _API.search(parts.path):
        raise UsageError(f"{url!r} is not where a server begins: {_EXAMPLE}, without /v1 or a query")
    host = "127.0.0.1" if parts.hostname in {"localhost", "::1"} else parts.hostname
    return f"{parts.scheme}://{host}:{port or _PORTS[parts.scheme]}{parts.path.rstrip('/')}"


def require_distinct(urls: Iterable[str]) -> None:
    """Refuse two URLs of one server: its memory would be filled twice.

    Raises:
        UsageError: Two are the same, or one is no base URL; names them.
    """
    seen: dict[str, str] = {}
    for url in urls:
        here = canonical(url)
        if here in seen:
            raise UsageError(f"{seen[here]} and {url} are the same server: give it once")
        seen[here] = url
