"""A contender: a policy and what it is given, as written on the command line.

`POLICY[+pool][+grouped|+suffix]`: `pool` lets engines share KV, `grouped` lets them draft from all siblings, `suffix`
from the request's own tokens alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from seer_async.errors import UsageError
from seer_async.policies import find_policy

if TYPE_CHECKING:
    from collections.abc import Iterable

ORACLE = "oracle"
_FEATURES = ("pool", "grouped", "suffix")


class Contender(msgspec.Struct, frozen=True):
    """A policy with or without a KV pool; `draft` is "grouped", "suffix" or None."""

    name: str
    policy: str
    pool: bool
    draft: str | None


C = TypeVar("C", bound=Contender)


def rival(contender: Contender, others: Iterable[C]) -> C | None:
    """The oracle among others that a contender is told a share of: it drafts alike, and has a pool if one of them has.

    It knows the true lengths and takes the longest first. That is not the best possible: a share may be above 1.
    """
    oracles = [other for other in others if other.policy == ORACLE and other.draft == contender.draft]
    return max(oracles, key=lambda other: other.pool, default=None)


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
