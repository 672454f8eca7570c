"""The cache salt of a call: what an engine, and the KV pool that it shares with others, keep KV apart by.

Invariant: calls that differ in run, weights, adapter or client's salt never have the same one.
"""

from __future__ import annotations

import hashlib

_LONGEST, _FORBIDDEN = 128, frozenset("@/\\\0")  # what vLLM refuses


def cache_salt(run: str, version: str, more: str) -> str:
    """The salt of calls that may share KV: those of one run, weight version and whatever else keeps KV apart.

    The run comes first, so that its blocks in a pool can be found. Engines refuse some characters and long salts, so
    what is not simply a version becomes a digest.
    """
    plain = f"{run}:{version}"
    if not more and len(plain) <= _LONGEST and _FORBIDDEN.isdisjoint(version):
        return plain
    return f"{run}:{hashlib.blake2b(repr((version, more)).encode(), digest_size=16).hexdigest()}"
