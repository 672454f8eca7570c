"""What one group is asked for beside its prompt; a run's groups share one value, a service's may all differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.sampling import Sampling

if TYPE_CHECKING:
    from seer_async.config import Config


class GroupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a group's responses are sampled and cut.

    `chunk_size` and `mixed_versions` are those of `RolloutConfig`. `passed` are sampling parameters of vLLM's that we
    do not touch; every call carries them as they are. `model` is a LoRA adapter, empty for the model itself. Groups of
    different `salt` or `model` share no KV. A response of an `indivisible` group is one call, because its options have
    a state that does not survive a chunk border; one that was cut short begins again.
    """

    sampling: Sampling = Sampling()
    chunk_size: int = 512
    mixed_versions: str = "restart"
    passed: dict[str, Any] = {}
    salt: str = ""
    model: str = ""
    indivisible: bool = False

    @classmethod
    def of(cls, config: Config) -> GroupOptions:
        """What a run's config says."""
        rollout = config.rollout
        return cls(sampling=config.sampling, chunk_size=rollout.chunk_size, mixed_versions=rollout.mixed_versions)
