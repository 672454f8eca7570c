"""Noise that depends only on (seed, absolute position), so that a seeded sample survives being cut into chunks.

Model Runner V1 gives a seeded request one `torch.Generator` whose stream runs on with every step. A resubmitted
continuation would start that stream again and repeat the noise of the first chunk. Here the generator of a
request that carries `seer_prompt_len` is re-seeded before each sampler call from its seed and the position of
the token about to be sampled.

That position is `InputBatch.num_tokens_no_spec`, the number of tokens the request has: prompt, resubmitted and
generated, with the placeholders of async scheduling counted as they are appended, and restored when a preempted
request returns. A row that is still prefilling samples too; its token is thrown away and nothing was used up.
With drafts a step samples several positions of a row: `verification` moves the generator on from one to the next.

Model Runner V2 needs nothing: its Gumbel noise is a hash of (seed, position, token id), where position is
`InputBatch.positions[logits_indices]`, the absolute position of the token that the logits follow
(sample/sampler.py, sample/gumbel.py). How the tokens before it were split plays no part, and a request with an
explicit seed never takes the fused sampler, whose noise is not keyed.
"""

from typing import Any, Self

import torch

from seer_servers.plugin.marker import original_prompt_len
from seer_servers.plugin.patching import Function, Patch

V2_SAMPLE_RANDOM = (
    "self",
    "processed_logits",
    "expanded_idx_mapping",
    "idx_mapping_np",
    "pos",
    "top_k",
    "top_p",
    "use_fused_sampler",
)
"""Parameters of V2's `Sampler._sample_random`, where seeds and positions meet the noise."""

_WORD = (1 << 64) - 1


def noise_seed(seed: int, position: int) -> int:
    """A 64-bit seed for the noise at one position; neighbouring seeds and positions share nothing visible.

    Each half of the result is as well mixed as the whole: a CPU generator looks at the low 32 bits only.
    """
    return _scramble(_scramble(seed & _WORD) ^ position)


def _scramble(word: int) -> int:
    """One step of SplitMix64: a bijection on 64-bit words whose every output bit depends on every input bit."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


class PositionGenerator(torch.Generator):  # type: ignore[misc]  # torch is not typed for mypy here
    """A request's random source, seeded anew for each position."""

    def __new__(cls, seed: int, device: torch.device) -> Self:
        """Allocate on `device`; torch wants the device here."""
        del seed
        return super().__new__(cls, device=device)  # type: ignore[no-any-return]

    def __init__(self, seed: int, device: torch.device) -> None:
        del device
        self.request_seed = seed
        self.position = 0

    def seek(self, position: int) -> None:
        """Make the next draws those of `position`, an index into prompt and response together."""
        self.position = position
        self.manual_seed(noise_seed(self.request_seed, position))

    # vLLM winds a generator back when it throws a token away (a prompt that is still being prefilled). There is
    # nothing to wind back here; and a CPU generator raises, which would end the engine.
    def get_offset(self) -> int:
        """Report no progress."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Ignore a rewind."""


def seek_rows(batch: Any) -> None:
    """Point every `PositionGenerator` of an input batch at the token its row samples next."""
    for row, generator in batch.generators.items():
        if isinstance(generator, PositionGenerator):
            generator.seek(int(batch.num_tokens_no_spec[row]))


def _around_post_init(post_init: Function) -> Function:
    def __post_init__(state: Any) -> None:  # noqa: N807 - it replaces the method of that name
        marked = original_prompt_len(state.sampling_params, state.prompt_token_ids) is not None
        if marked and state.generator is not None:
            state.generator = PositionGenerator(state.sampling_params.seed, state.generator.device)
        post_init(state)

    return __post_init__


def _around_sample(sample: Function) -> Function:
    def _sample(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        seek_rows(runner.input_batch)
        return sample(runner, logits, spec_decode_metadata)

    return _sample


def v1_patches(runner: type, request_state: type) -> tuple[Patch, ...]:
    """Patches for Model Runner V1, given its classes GPUModelRunner and CachedRequestState."""
    return (
        Patch(request_state, "__post_init__", ("self",), _around_post_init),
        Patch(runner, "_sample", ("self", "logits", "spec_decode_metadata"), _around_sample),
    )
