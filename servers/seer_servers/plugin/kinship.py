"""Whose sibling a request is, and what its tokens are worth: as its call says, or by its prompt where it says nothing.

Invariant: engines give the same prompt and cache salt the same group.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from seer_async.drafting.budget import HIGH_WEIGHT


class Kinship(NamedTuple):
    """A request among its siblings; the names are the same on all engines."""

    group: str
    request: str
    weight: float  # of one of its tokens, against one of any other


def kinship_of(request_id: str, prompt: Sequence[int], extra: Mapping[str, Any]) -> Kinship:
    """What `extra` (a call's extra_args) says; `prompt` is the original one, without a response to be continued."""
    return Kinship(
        group=str(extra.get("seer_group") or _digest(prompt, extra.get("seer_salt"))),
        request=str(extra.get("seer_request") or request_id),
        weight=HIGH_WEIGHT if extra.get("seer_priority") == "high" else 1.0,
    )


def _digest(prompt: Sequence[int], salt: object) -> str:
    return blake2b(np.asarray(prompt, dtype=np.int32).tobytes() + repr(salt).encode(), digest_size=12).hexdigest()
