"""Whose sibling a request is, and what its tokens are worth: as its call says, or by its prompt where it says nothing.

Invariants: engines give the same prompt and cache salt the same group; what a call says is from outside, and what is no
name (`is_name`) counts as not said.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from seer_async.drafting.budget import HIGH_WEIGHT
from seer_servers.drafting.wire import is_name

SALT = "seer_salt"  # the request's cache salt, as it travels to the worker (see `drafting`)


class Kinship(NamedTuple):
    """A request among its siblings; the names are the same on all engines."""

    group: str
    request: str
    weight: float  # of one of its tokens, against one of any other


def kinship_of(request_id: str, prompt: Sequence[int], extra: Mapping[str, Any]) -> Kinship:
    """What `extra` (a call's extra_args) says; `prompt` is the original one, without a response to be continued."""
    return Kinship(
        group=_name(extra, "seer_group") or _digest(prompt, extra.get(SALT)),
        request=_name(extra, "seer_request") or request_id,
        weight=HIGH_WEIGHT if extra.get("seer_priority") == "high" else 1.0,
    )


def _name(extra: Mapping[str, Any], key: str) -> str | None:
    said = extra.get(key)
    return said if is_name(said) else None


def _digest(prompt: Sequence[int], salt: object) -> str:
    said = repr(salt) if isinstance(salt, str) else ""  # a call can send anything under the salt's name
    return blake2b(np.asarray(prompt, dtype=np.int32).tobytes() + said.encode(), digest_size=12).hexdigest()
