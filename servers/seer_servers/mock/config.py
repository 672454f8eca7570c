"""What a mock engine is started with, and which combinations of it make no engine."""

from __future__ import annotations

import msgspec

from seer_async.errors import ConfigError
from seer_servers.mock.model import LanguageModel
from seer_servers.mock.speed import KV, Speed
from seer_servers.mock.tokenizer import MIN_VOCAB_SIZE


class MockConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is the served model name, `max_model_len` counts prompt and response tokens.

    `world_size` is how many workers the engine says it has. With `draft_acceptance` above 0 it counts drafts, of whose
    first token this share is accepted.
    """

    name: str = "mock"
    max_model_len: int = 16_384
    world_size: int = 1
    draft_acceptance: float = 0.0
    model: LanguageModel = LanguageModel()
    speed: Speed = Speed()
    kv: KV = KV()

    def __post_init__(self) -> None:
        """Refuse what no engine could run; the messages name the command's options."""
        model, speed, kv = self.model, self.speed, self.kv
        _require(
            model.vocab_size >= MIN_VOCAB_SIZE, f"--vocab-size must be at least {MIN_VOCAB_SIZE}, to hold all bytes"
        )
        _require(model.mean_length >= 1, "--mean-length must be at least 1 token")
        _require(model.sigma >= 0, "--sigma must be 0 or more")
        _require(speed.time_scale >= 0, "--time-scale must be 0 (answer at once) or more")
        _require(speed.step_ms >= 0, "--step-ms must be 0 or more")
        _require(speed.per_request_ms >= 0, "--per-request-ms must be 0 or more")
        _require(speed.prefill_rate > 0, "--prefill-rate must be above 0")
        _require(self.world_size >= 1, "--world-size must be at least 1")
        _require(0 <= self.draft_acceptance <= 1, "--draft-acceptance must be from 0 (no drafts) to 1")
        _require(kv.block_size >= 1, "--block-size must be at least 1 token")
        _require(kv.max_num_seqs >= 1, "--max-num-seqs must be at least 1")
        _require(self.max_model_len > 1, "--max-model-len must be at least 2, a prompt token and a response token")
        _require(
            self.max_model_len <= kv.capacity,
            f"--max-model-len must be at most --num-blocks x --block-size = {kv.capacity}, so that one request fits",
        )


def _require(ok: bool, message: str) -> None:  # noqa: FBT001 - a condition is what it takes
    if not ok:
        raise ConfigError(message)
