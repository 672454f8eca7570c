"""How many drafted tokens a step verifies, and whose: vLLM's adaptive verification, with our confidences and costs.

It takes the most tokens per millisecond, given each drafted token's confidence and the cost of a step by its tokens.
The cost is that of the model, of sampling, and never less than what the host takes to prepare a step. Drafts never
take a step beyond the largest CUDA graph: launched kernel by kernel, it takes the host several times as long.

The host decides how many, from forecasts that the GPU writes into the host's memory after each step; the GPU decides
whose, by the confidences of the drafts at hand. vLLM's own way to do both takes the host two to four times as long,
with copies and events for the forecasts and a dozen launches for the admission.

Invariant: what is verified depends on the past alone, never on what is being drawn, so what is kept has the policy's
distribution. A forecast may be read while it is being written: it is a guess, and both values are of the past.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from seer_servers.plugin.gpu_kernels import admit

PROFILE_CONTEXT = 512  # tokens; more would count each drafted token as a reader of a long context of its own
SAMPLING_ROWS = (1, 128)  # the sampler is timed on these and taken to be linear
TIMED_RUNS = 5
COMPILED_ROWS = (2, 16)  # Triton compiles anew for multiples of 16
GATHER_KINDS = (torch.int64, torch.int64, torch.int32)  # places of logits, slots, offsets within a draft
HOST_SHARE = 0.05  # of the newest step in the average of the host's time
HOST_CHANGE = 1.05  # below this factor the cost table stays


class Admission(AdaptiveVerificationManager):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's choice of how much to verify, with our confidences and costs."""

    _cudagraph_limit: int  # vLLM's own: tokens of its largest CUDA graph; 0 without any
    _max_total_logits: int  # and how many positions it lets a step verify, drafts and others
    _batch_budget: tuple[Any, Any, int] | None  # and, as its last part, how many drafted tokens this step verifies
    _cu_num_logits: torch.Tensor  # and, on the GPU, where each request's logits begin

    def __init__(self, plain: AdaptiveVerificationManager, runner: Any) -> None:
        self.__dict__.update(vars(plain))  # it takes the place of that one, and its buffers
        self._runner = runner
        self._confidence_probs: torch.Tensor = runner.speculator.choice.confidences
        self._forecasts: NDArray[np.float32] = runner.speculator.forecasts
        self._counts: NDArray[np.int32] = np.zeros((2, 0), np.int32)  # by request, in this step: drafted tokens, others
        self._model_ms: NDArray[np.float64] | None = None
        self._host_ms = self._assumed_ms = 0.0
        self._waited = 0.0
        self._last: float | None = None

    def add_request(self, req_idx: int) -> None:
        """Expect nothing of a request of which nothing is known; what is on the GPU the speculator sees to."""
        self._forecasts[req_idx] = 0.0

    def rest(self) -> None:
        """Take part in a step that neither has drafts nor asks for any."""
        self._last = None

    def record_confidences(self, confidence_probs: torch.Tensor, input_batch: Any) -> None:
        """Note that a step with drafts was launched; its confidences and forecasts are where they belong."""
        del confidence_probs
        if self._runner.speculator.idle:
            self.rest()
        else:
            self._learn_host_time(replayed=input_batch.decode_graph_eligible)

    def get_num_tokens(self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]) -> int:
        """Decide how many drafted tokens this step verifies; returns its tokens, with those."""
        assert self.cost_tables is not None
        requests, states = len(num_tokens_per_req), self.req_states
        slots = np.fromiter(map(states.req_id_to_index.__getitem__, num_tokens_per_req), np.intp, requests)
        scheduled = np.fromiter(num_tokens_per_req.values(), np.int64, requests)
        drafted = np.fromiter((len(draft_tokens.get(name, ())) for name in num_tokens_per_req), np.int64, requests)
        others = scheduled - drafted
        sampling = np.count_nonzero(states.num_computed_tokens_np[slots] + others >= states.prefill_len.np[slots])
        first = int(others.sum())
        most = min(int(drafted.sum()), max(0, self._max_total_logits - requests * self.num_bonus_tokens))
        if first <= self._cudagraph_limit:
            most = min(most, self._cudagraph_limit - first)
        expected = np.full(most + 1, float(sampling))
        expected[1:] += np.cumsum(self._scores(slots, drafted)[:most])
        draft_ms, verify_ms = self.cost_tables
        budget = int(np.argmax(expected / (draft_ms[requests] + verify_ms[first : first + most + 1])))
        self._batch_budget = None, None, budget
        return first + budget

    def _scores(self, slots: NDArray[np.intp], drafted: NDArray[np.int64]) -> NDArray[np.float32]:
        """The chance of each drafted token to be kept, the best first."""
        steps = self._forecasts.shape[1]
        survival = np.multiply.accumulate(self._forecasts[slots], axis=1)
        scores = survival.ravel() if drafted.min() == steps else survival[np.arange(steps) < drafted[:, None]]
        scores.sort()
        best_first: NDArray[np.float32] = scores[::-1]
        return best_first

    def compact_batch(
        self, num_draft_tokens_per_req: Any, num_scheduled_tokens: Any, cu_num_logits_np: Any
    ) -> tuple[Any, Any]:
        """vLLM's, which spreads on the host what the GPU admits otherwise."""
        self._counts = np.stack((num_draft_tokens_per_req, num_scheduled_tokens - num_draft_tokens_per_req))
        compacted: tuple[Any, Any] = super().compact_batch(
            num_draft_tokens_per_req, num_scheduled_tokens, cu_num_logits_np
        )
        return compacted

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Admit the best drafted tokens: where requests' logits and queries begin now, and how many were admitted."""
        assert self._batch_budget is not None
        budget = self._batch_budget[-1]
        self._batch_budget = None
        counts = async_tensor_h2d(self._counts, device=idx_mapping.device, dtype=torch.int32)
        admit(
            self._confidence_probs,
            idx_mapping,
            counts,
            budget,
            logits=self._cu_num_logits,
            queries=self.query_start_loc,  # the runner has filled it beyond these requests
            bonus=self.num_bonus_tokens,
        )
        return self._cu_num_logits[: len(req_ids) + 1], self.query_start_loc, budget

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
        """Compile what is else compiled in the first step with drafts, where it would take a tenth of a second."""
        buffers, device = self._runner.input_buffers, self.req_states.device
        for rows in COMPILED_ROWS:
            places, index, offsets = (torch.zeros(rows, dtype=kind, device=device) for kind in GATHER_KINDS)
            rejection_sampler.gather_draft_sampled(
                buffers.input_ids, buffers.positions, places, index, offsets, self.req_states.prefill_len.gpu
            )
        logits, queries = torch.zeros_like(self._cu_num_logits), torch.zeros_like(self.query_start_loc)
        for requests in {min(1 << power, self.req_states.max_num_reqs) for power in range(16)}:
            slots = torch.zeros(requests, dtype=torch.int64, device=device)
            counts = torch.zeros(2, requests, dtype=torch.int32, device=device)
            admit(self._confidence_probs, slots, counts, 0, logits=logits, queries=queries, bonus=self.num_bonus_tokens)

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
