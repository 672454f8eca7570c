"""How Model Runner V2 verifies grouped drafts: each position is drawn as without drafts.

vLLM's rejection sampler accepts a drafted token with the policy's probability for it and otherwise draws from what is
left: the right distribution, but other tokens than without drafts. Here every position is drawn by the sampler's own
keyed noise, and a draft is accepted as far as it says the same; the chance to be accepted is the same.

Steps of mixed lengths replay CUDA graphs captured for the longest; one without drafts must be described as such, too.

Invariant: a request without drafts is sampled exactly as without speculation.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from seer_servers.plugin.gpu_kernels import follow
from seer_servers.plugin.patching import Function, Patch

REJECTION_SAMPLE = (
    "target_logits",
    "draft_logits",
    "draft_sampled",
    "cu_num_logits",
    "pos",
    "idx_mapping",
    "expanded_idx_mapping",
    "expanded_local_pos",
    "temperature",
    "seed",
    "num_speculative_steps",
    "synthetic_conditional_rates",
    "use_fp64",
    "use_block_verification",
    "contexts",
    "watermarking",
    "watermarking_skip_mask",
    "watermark_key",
)
PREPARE_INPUTS = ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras")


def patches() -> tuple[Patch, ...]:
    """Patches for Model Runner V2, for engines whose drafts are fixed tokens."""
    return (
        Patch(rejection_sampler, "rejection_sample", REJECTION_SAMPLE, _around_rejection_sample),
        Patch(GPUModelRunner, "prepare_inputs", PREPARE_INPUTS, _around_prepare_inputs),
    )


def _around_rejection_sample(rejection_sample: Function) -> Function:
    def _rejection_sample(  # noqa: PLR0917 - vLLM calls it so
        target_logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        cu_num_logits: torch.Tensor,
        pos: torch.Tensor,
        idx_mapping: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        temperature: torch.Tensor,
        seed: torch.Tensor,
        num_speculative_steps: int,
        synthetic_conditional_rates: torch.Tensor | None = None,
        *,
        use_fp64: bool = False,
        **other: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if draft_logits is None and synthetic_conditional_rates is None and not any(map(_is_set, other.values())):
            rows, settings = expanded_idx_mapping, (temperature, seed, pos)
            drawn = gumbel_sample(
                target_logits, rows, *settings, apply_temperature=False, is_drafting=False, use_fp64=use_fp64
            )
            return follow(drawn, draft_sampled, cu_num_logits, num_speculative_steps)
        kept: tuple[torch.Tensor, torch.Tensor] = rejection_sample(
            target_logits,
            draft_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            expanded_idx_mapping,
            expanded_local_pos,
            temperature,
            seed,
            num_speculative_steps,
            synthetic_conditional_rates,
            use_fp64=use_fp64,
            **other,
        )
        return kept

    return _rejection_sample


def _is_set(option: Any) -> bool:
    return option is not None and option is not False


def _around_prepare_inputs(prepare_inputs: Function) -> Function:
    """Describe a step to attention by the query length that its CUDA graph was captured for.

    vLLM does so only where drafts are scheduled; without, it says that all queries are of one token. For those
    FlashAttention 3 plans without a causal mask, unless heads are of 65 to 128 numbers, and lays out such a plan
    otherwise than the captured kernel reads it: the step's attention is then garbage.
    """

    def _prepare_inputs(runner: Any, scheduler_output: Any, state: Any, graph: Any, num_active_loras: int) -> Any:
        batch = prepare_inputs(runner, scheduler_output, state, graph, num_active_loras)
        if graph.max_query_len is not None:
            batch.max_query_len = graph.max_query_len
        return batch

    return _prepare_inputs
