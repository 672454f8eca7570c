"""What clients and the draft server say to each other: msgpack, typed, one reply to each request.

Invariants: a message is at most `MAX_MESSAGE` bytes; names are at most `MAX_NAME` characters; tokens travel and are
kept as little-endian int32; a reply carries its request's serial number and the `boot` of the server's life, by which
clients notice that it has forgotten everything. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKEN_BYTES = 4
MAX_NAME = 256
MAX_MESSAGE = 4 << 20
MAX_COUNT = 1 << 40
BATCH_TOKENS = 1 << 18  # in one message; a name counts as one for each character, which is what it takes at most
DEFAULT_TTL_S = 600.0
MAX_TTL_S = 86_400.0

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Ttl: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_S)]
Counts: TypeAlias = dict[Name, dict[Name, Count]]  # group -> request -> tokens known
Deltas: TypeAlias = dict[Name, dict[Name, tuple[Count, bytes]]]  # group -> request -> (position, tokens)


class _Request(msgspec.Struct, frozen=True, array_like=True):
    serial: int


class Register(_Request, frozen=True, tag="r"):
    """`register_group`: keep groups for so many seconds after their last use."""

    ttls: dict[Name, Ttl]


class Update(_Request, frozen=True, tag="u"):
    """`update_cst`: tokens of some requests, each from a position on."""

    deltas: Deltas


class Fetch(_Request, frozen=True, tag="f"):
    """`fetch_cst`: what the server has of these groups beyond what the client knows."""

    known: Counts


class AskStats(_Request, frozen=True, tag="s"):
    """Ask for the server's counts."""


class _Reply(msgspec.Struct, frozen=True, array_like=True):
    serial: int
    boot: str


class Done(_Reply, frozen=True, tag="d"):
    """To `Register` and `Update`. `have` is where to resend from after gaps, `full` the requests that were refused."""

    have: Counts = {}
    full: dict[Name, list[Name]] = {}


class Fetched(_Reply, frozen=True, tag="f"):
    """To `Fetch`; with `more`, ask again at once."""

    deltas: Deltas
    more: bool


class Stats(_Reply, frozen=True, tag="s"):
    """To `AskStats`. Counts since the start; `bytes` is an estimate of the memory, `cpu_s` all CPU time of the process.

    `duplicates` are updates that brought nothing new, `gaps` updates that began too late, `expired` and `evicted` whole
    groups, `refused_tokens` tokens for which there was no room, `malformed` messages that made no sense.
    """

    groups: int
    requests: int
    tokens: int
    bytes: int
    registrations: int
    updates: int
    fetches: int
    duplicates: int
    gaps: int
    expired: int
    evicted: int
    dropped_tokens: int
    refused_tokens: int
    malformed: int
    uptime_s: float
    cpu_s: float


Request: TypeAlias = Register | Update | Fetch | AskStats
Reply: TypeAlias = Done | Fetched | Stats

encoder = msgspec.msgpack.Encoder()
request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def is_name(name: object) -> bool:
    """Whether a name can travel; unprintable ones may not even be UTF-8."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def pack(tokens: Sequence[int]) -> bytes:
    """Return token ids as bytes; raises struct.error if one is not an int32."""
    return struct.pack(f"<{len(tokens)}i", *tokens)
