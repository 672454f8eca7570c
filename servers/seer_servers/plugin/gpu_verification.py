"""How Model Runner V2 verifies grouped drafts: each position is drawn as without drafts, and only as many as pay.

vLLM's rejection sampler accepts a drafted token with the policy's probability for it and otherwise draws from what is
left: the right distribution, but other tokens than without drafts. Here every position is drawn by the sampler's own
keyed noise, and a draft is accepted as far as it says the same; the chance to be accepted is the same.

How many drafted tokens a step verifies is vLLM's adaptive verification: it takes the most tokens per millisecond, given
each drafted token's confidence and the cost of a step by its tokens. The confidences are ours, and so is the cost: that
of the model, of sampling, and never less than what the host takes to prepare a step. Drafts never take a step beyond
the largest CUDA graph: launched kernel by kernel, it takes the host several times as long.

Steps of mixed lengths replay CUDA graphs captured for the longest; one without drafts must be described as such, too.

Invariants: how many drafts are verified depends on the past alone, never on what is being drawn, so what is kept has
the policy's distribution; a request without drafts is sampled exactly as without speculation.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.worker.gpu.async_utils import stream
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode import adaptive_verification, rejection_sampler
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from seer_servers.plugin.gpu_kernels import follow
from seer_servers.plugin.patching import Function, Patch

PROFILE_CONTEXT = 512  # tokens; more would count each drafted token as a reader of a long context of its own
SAMPLING_ROWS = (1, 128)  # the sampler is timed on these and taken to be linear
TIMED_RUNS = 5
COMPILED_ROWS = (2, 16)  # Triton compiles anew for multiples of 16
GATHER_KINDS = (torch.int64, torch.int64, torch.int32)  # places of logits, slots, offsets within a draft
HOST_SHARE = 0.05  # of the newest step in the average of the host's time
HOST_CHANGE = 1.05  # below this factor the cost table stays

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
ASSIGN = ("confidence_probs", "idx_mapping", "capacities", "draft_budget", "num_steps")
PREPARE_INPUTS = ("self", "scheduler_output", "batch_req_state", "batch_desc", "num_active_loras")


def patches() -> tuple[Patch, ...]:
    """Patches for Model Runner V2, for engines whose drafts are fixed tokens."""
    return (
        Patch(rejection_sampler, "rejection_sample", REJECTION_SAMPLE, _around_rejection_sample),
        Patch(adaptive_verification, "_assign_draft_token_budget_compiled", ASSIGN, _around_assign),
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


def _around_assign(_: Function) -> Function:
    """Leave the few operations uncompiled: compiling them for each new shape would hold up requests for seconds."""

    def _assign(confidence: Any, requests: Any, capacities: torch.Tensor, budget: int, steps: int) -> None:
        if len(capacities) == 1:
            capacities.fill_(budget)  # less than its capacity, or vLLM would not ask
        else:
            adaptive_verification._assign_draft_token_budget(  # noqa: SLF001 - it is what was compiled
                confidence, requests, capacities, budget, steps
            )

    return _assign


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


class GroupedVerification(AdaptiveVerificationManager):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's choice of how much to verify, with our confidences and costs."""

    _stale_idx: int  # vLLM's own: the page of confidences that the host reads
    _pending_resets: list[int]  # and the slots whose entries on the other page are of requests that left
    _cudagraph_limit: int  # tokens of its largest CUDA graph; 0 without any
    _max_total_logits: int  # and how many positions it lets a step verify, drafts and others

    def __init__(self, plain: AdaptiveVerificationManager, runner: Any) -> None:
        super().__init__(
            plain.req_states,
            plain.query_start_loc,
            plain.num_bonus_tokens,
            plain._max_total_logits,  # noqa: SLF001 - the manager that this one replaces
        )
        self._runner = runner
        self._choice = runner.speculator.choice._replace(confidences=self._confidence_probs)
        self._confidence_probs.zero_()
        runner.speculator.choice = self._choice
        runner.speculator.draft_token_confidence_probs = self._confidence_probs
        for slot in self._stale_confidences:
            slot.np.fill(0.0)
        self._model_ms: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self._host_ms = self._assumed_ms = 0.0
        self._waited = 0.0
        self._last: float | None = None

    def add_request(self, req_idx: int) -> None:
        """Expect nothing of a request of which nothing is known."""
        self._stale_confidences[self._stale_idx].np[req_idx].fill(0.0)
        self._pending_resets.append(req_idx)  # what is on the GPU the speculator sees to

    def rest(self) -> None:
        """Take part in a step that neither has drafts nor asks for any."""
        self._last = None
        if len(self._pending_resets) > self.req_states.max_num_reqs:
            self._pending_resets = list(set(self._pending_resets))

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: Any) -> None:
        """Have the forecasts copied to the host, where the step after next reads them."""
        del confidence_probs  # the drafter has written them where they belong
        if self._runner.speculator.idle:
            self._last = None
            return
        self._learn_host_time(replayed=input_batch.decode_graph_eligible)
        write = self._stale_idx
        self._stale_idx = write ^ 1
        begin = time.perf_counter()
        with gpu_sync_allowed():
            self._copy_events[self._stale_idx].synchronize()
        self.waited(time.perf_counter() - begin)
        self._stale_confidences[self._stale_idx].np[self._pending_resets] = 0.0
        self._pending_resets.clear()
        page = self._stale_confidences[write]
        page.gpu.copy_(self._choice.forecasts)
        current = torch.cuda.current_stream(self.req_states.device)
        self._copy_stream.wait_stream(current)
        with stream(self._copy_stream, current):
            page.copy_to_cpu()
            self._copy_events[write].record()

    def waited(self, seconds: float) -> None:
        """Leave out of the host's time what it waited for the GPU."""
        self._waited += seconds

    def _learn_host_time(self, *, replayed: bool) -> None:
        """Learn from a step that replayed a CUDA graph; one that prefills takes the host far longer."""
        now = time.perf_counter()
        if replayed and self._last is not None and self._model_ms is not None:
            busy = min((now - self._last - self._waited) * 1e3, 2 * self._host_ms + 1)  # an idle engine is not busy
            self._host_ms += HOST_SHARE * (busy - self._host_ms)
            if not 1 / HOST_CHANGE < self._host_ms / max(self._assumed_ms, 1e-3) < HOST_CHANGE:
                self._assumed_ms = self._host_ms
                self.cost_tables = (
                    np.zeros(self.req_states.max_num_reqs + 1),
                    np.maximum(self._model_ms, self._host_ms),
                )
        self._last, self._waited = now, 0.0

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """Those of vLLM, with a shorter context."""
        for batch in super().batches_to_profile(capture_sizes):
            yield batch | {"context_len": PROFILE_CONTEXT}

    def set_cost_curves(self, draft_curve: list[tuple[int, float]], verify_curve: list[tuple[int, float]]) -> None:
        """Add the time of sampling to the profiled time of the model."""
        few, many = (self._time_sampling(rows) for rows in SAMPLING_ROWS)
        slope = max(0.0, many - few) / (SAMPLING_ROWS[1] - SAMPLING_ROWS[0])
        super().set_cost_curves(draft_curve, [(tokens, ms + few + slope * tokens) for tokens, ms in verify_curve])
        assert self.cost_tables is not None
        self._model_ms = self.cost_tables[1]
        if self._cudagraph_limit:
            self._max_total_logits = min(self._max_total_logits, self._cudagraph_limit)
        self._compile()

    def _compile(self) -> None:
        """Compile what vLLM leaves for the first step with drafts, where it would take a tenth of a second."""
        buffers, device = self._runner.input_buffers, self.req_states.device
        for rows in COMPILED_ROWS:
            places, index, offsets = (torch.zeros(rows, dtype=kind, device=device) for kind in GATHER_KINDS)
            rejection_sampler.gather_draft_sampled(
                buffers.input_ids, buffers.positions, places, index, offsets, self.req_states.prefill_len.gpu
            )

    def _time_sampling(self, rows: int) -> float:
        """Milliseconds that logits and draws of `rows` positions take."""
        config, device = self._runner.model_config, self.req_states.device
        hidden = torch.zeros(rows, config.get_hidden_size(), dtype=config.dtype, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        settings = self._runner.sampler.sampling_states
        times = []
        for _ in range(TIMED_RUNS):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            logits = self._runner.model.compute_logits(hidden)
            noise = index, settings.temperature.gpu, settings.seeds.gpu, index
            gumbel_sample(logits.float(), *noise, apply_temperature=False, is_drafting=False)
            events[1].record()
            events[1].synchronize()
            times.append(events[0].elapsed_time(events[1]))
        return float(np.median(times))
