"""A contender: a policy and what it is given, as written on the command line.

`POLICY[+pool][+grouped|+suffix]`: `pool` lets engines share KV, `grouped` lets them draft from all siblings, `suffix`
from the request's own tokens alone.
"""

from __future__ import annotations

import msgspec

from seer_async.errors import UsageError
from seer_async.policies import find_policy

_FEATURES = ("pool", "grouped", "suffix")


class Contender(msgspec.Struct, frozen=True):
    """A policy with or without a KV pool; `draft` is "grouped", "suffix" or None."""

    name: str
    policy: str
    pool: bool
    draft: str | None


def parse_contender(text: str) -> Contender:
    """Read `POLICY[+pool][+grouped|+suffix]`.

    Raises:
        UsageError: A feature is unknown, or both ways to draft are given.
        ConfigError: The policy is unknown.
    """
    policy, *features = text.split("+")
    find_policy(policy)
    if unknown := [feature for feature in features if feature not in _FEATURES]:
        raise UsageError(f"{text!r}: unknown feature {unknown[0]!r}; a policy takes +pool, and +grouped or +suffix")
    drafts = [feature for feature in features if feature != "pool"]
    if len(drafts) > 1:
        raise UsageError(f"{text!r}: an engine drafts in one way; give +grouped or +suffix")
    return Contender(text, policy, "pool" in features, drafts[0] if drafts else None)
