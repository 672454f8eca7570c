"""What control requests carry: a JSON body, and parameters in the query."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from seer_servers.service.bodies import decode
from seer_servers.service.errors import bad_request

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

_Body = TypeVar("_Body")

_FLAGS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}


async def read_body(request: web.Request, kind: type[_Body]) -> _Body:
    """Decode the body, none being an empty object; raises ApiError 400 if it is not a `kind`."""
    return decode(await request.read() or b"{}", kind)


def flag(request: web.Request, name: str, *, default: bool) -> bool:
    """A truth value of the query."""
    given = request.query.get(name)
    if given is None:
        return default
    if given.lower() not in _FLAGS:
        raise bad_request(f"{name} must be true or false, not {given!r}", name)
    return _FLAGS[given.lower()]


def choice(request: web.Request, name: str, among: Collection[str], *, default: str) -> str:
    """One of several words of the query."""
    given = request.query.get(name, default)
    if given not in among:
        raise bad_request(f"{name} must be one of {', '.join(among)}, not {given!r}", name)
    return given
