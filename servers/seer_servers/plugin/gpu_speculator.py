"""Grouped drafting inside Model Runner V2: siblings' tokens are matched on the GPU, and async scheduling stays on.

After each step a request's last tokens are looked up in all sequences of its group (`gpu_siblings`), the longest match
makes the draft, and the share of drafts of its kind that were accepted makes its confidence. Both are counted and
computed on the GPU, which writes what the host needs into the host's memory. `gpu_admission` and `gpu_switch` keep
drafts from costing more than they bring.

Invariants: nothing here waits for the GPU or for anything outside the process; a confidence depends on what was sampled
before, never on the draw that it is about.
"""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d, get_accelerator_view_from_cpu_tensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from seer_servers.drafting.client import drafter_client
from seer_servers.drafting.wire import DEFAULT_TTL_S
from seer_servers.plugin.draft_stats import MAX_GROUPS, Publisher
from seer_servers.plugin.gpu_kernels import (
    GONE,
    KINDS,
    LENGTHS,
    LONGEST_MATCH,
    MEMBERS,
    SUPPORTS,
    Batch,
    Choice,
    Peeked,
    Totals,
    Weights,
    choose,
    compare,
    observe,
    scan,
)
from seer_servers.plugin.gpu_outlook import Outlook
from seer_servers.plugin.gpu_siblings import Name, Siblings
from seer_servers.plugin.kinship import kinship_of

SHARED_TOKENS = 32  # of a request, handed on together: one by one they would cost the engine's process too much
FETCH_STEPS = 8
# Steps without drafts between two looks at what siblings do and what drafts would bring; a multiple of the above.
REST_STEPS = 32
FOLD_STEPS = 32  # steps between two looks at what was accepted
KEPT = 0.98  # of what was counted, at each fold: half is forgotten in about a thousand steps
PRIOR_WEIGHT = 4.0  # drafts
PRIOR_BY_LENGTH = (0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85)
PRIOR_BY_SUPPORT = (0.8, 0.6, 1.0)
RECENT = 0.1  # share of the newest confidence in a request's average
SPLIT_TOKENS = 2048  # a sequence is searched in parts of about this size
MAX_SPLITS = 8


class GroupedSpeculator(BaseSpeculator):  # type: ignore[misc]  # vLLM has no types here
    """Drafts for Model Runner V2."""

    supports_mm_inputs = False
    draft_logits = None
    enable_adaptive_verification = True

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        spec = vllm_config.speculative_config
        slots, steps = req_states.max_num_reqs, spec.num_speculative_tokens
        self.enabled = self.adaptive = True  # drafting is allowed, where it pays (see `gpu_switch`)
        self.idle = True  # whether the last step went without drafts
        self.siblings = Siblings(req_states, vllm_config.model_config.get_vocab_size())
        self.running: dict[str, Running] = {}
        self.newcomers: dict[int, float] = {}  # by slot, of whose request nothing is known yet: its weight
        self.client = drafter_client()
        self._match = {"shortest": spec.prompt_lookup_min, "longest": min(spec.prompt_lookup_max, LONGEST_MATCH)}
        self._splits = max(1, min(MAX_SPLITS, req_states.max_model_len // SPLIT_TOKENS))

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        forecasts, self.forecasts = _shared(slots, steps, device)
        self.choice = Choice(
            drafts=zeros(slots, steps, dtype=torch.int64),
            confidences=zeros(slots, steps),
            averages=zeros(slots, steps),
            forecasts=forecasts,
            kinds=zeros(slots, dtype=torch.int32) - 1,
            offered=zeros(slots, dtype=torch.int32),
        )
        self.draft_token_confidence_probs = self.choice.confidences
        self._found = zeros(slots * (1 + MEMBERS) * self._splits, dtype=torch.int32)
        self._tallies = zeros(2, KINDS, steps, dtype=torch.int32)
        self._totals = Totals(
            zeros(2, steps, dtype=torch.int64), zeros(self.siblings.most_groups, 3, dtype=torch.int64)
        )
        self._weights = zeros(slots) + 1
        self._mean_weight = 1.0  # of the requests that run
        self.outlook = Outlook(device)
        self._peeked: Peeked | None = None
        self._ones = zeros(slots, dtype=torch.int32) + 1
        self._prior = _prior(steps).to(device)
        self._counts = zeros(2, KINDS, steps)
        self._rates = self._prior.clone()
        self._page = Page(self._totals, self.siblings)

    def settings(self) -> dict[str, Any]:
        """What `configure` can change."""
        return {"enabled": self.enabled, "adaptive": self.adaptive}

    def configure(self, *, enabled: bool | None = None, adaptive: bool | None = None, **other: Any) -> None:
        """Change settings; raises ValueError if there are others, and then changes none."""
        if other:
            raise ValueError(f"On a GPU only enabled and adaptive can be changed, not {', '.join(other)}.")
        self.enabled = self.enabled if enabled is None else enabled
        self.adaptive = self.adaptive if adaptive is None else adaptive

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing here runs in a CUDA graph."""

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not typed here
    def capture(self) -> None:
        """Compile the kernels before requests need them: they differ by the power of two above a group's size."""
        device = self._found.device
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        batch = Batch(torch.zeros(1, dtype=torch.int64, device=device), nothing, torch.arange(2, device=device).int())
        for power in range((1 + MEMBERS).bit_length()):
            self._look_up(batch, 1 << power)
        compare(self.siblings.tables, Peeked(batch.slots, nothing), self.choice, self._tallies, self.outlook.seen)
        self._tallies.zero_()
        self.outlook.seen.zero_()

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not typed here
    def propose(  # noqa: PLR0917 - vLLM calls it so
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        *others: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **more: Any,
    ) -> torch.Tensor:
        """Drafts [requests, steps] for the step after this one; nothing new if none are asked for."""
        del attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, others, more
        begin = time.perf_counter()
        drafts = self.choice.drafts[: input_batch.num_reqs]
        if dummy_run:
            return drafts
        self.idle = num_speculative_tokens == 0
        self._take_in()
        if not self.idle:
            self._draft(Batch(input_batch.idx_mapping, num_sampled, input_batch.cu_num_logits))
        self._page.step(time.perf_counter() - begin, off=self.idle, references=self.siblings.references)
        return drafts

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not typed here
    def rest(self, input_batch: Any) -> None:
        """Take part in a step that neither has drafts nor asks for any; it is to cost nothing."""
        begin = time.perf_counter()
        self.idle = True
        if self._page.steps % REST_STEPS == 0:
            self._take_in()
            self._peek(input_batch)
        self._page.step(time.perf_counter() - begin, off=True, references=self.siblings.references)

    def _peek(self, input_batch: Any) -> None:
        """See what the last look would have brought, and look anew for the requests of this step."""
        self._forget_before()
        tables = self.siblings.tables
        if self._peeked is not None:
            compare(tables, self._peeked, self.choice, self._tallies, self.outlook.seen)
            self._fold()
            self.outlook.read()
        self._peeked = None
        if not input_batch.has_prefill:
            slots = input_batch.idx_mapping.clone()
            self._peeked = Peeked(slots, tables.slot_lengths[slots])
            ones = self._ones[: len(slots)]
            self._look_up(Batch(slots, ones, ones), 1 + self.siblings.most_members)

    def _draft(self, batch: Batch) -> None:
        self._peeked = None
        self._forget_before()
        observe(batch, self.choice, self._tallies, self._totals, self.siblings.tables.groups)
        if self._page.steps % FOLD_STEPS == 0:
            self._fold()
        self._look_up(batch, 1 + self.siblings.most_members)

    def _forget_before(self) -> None:
        """Expect nothing of requests that came since the last draft: their slots, and groups' numbers, were others'."""
        if self.newcomers:
            slots = self._to_gpu(list(self.newcomers), torch.int64)
            for by_slot in (self.choice.confidences, self.choice.averages, self.choice.forecasts):
                by_slot.index_fill_(0, slots, 0.0)
            self.choice.kinds.index_fill_(0, slots, GONE.value)
            self._weights.index_copy_(0, slots, self._to_gpu(list(self.newcomers.values()), torch.float32))
            self.newcomers.clear()
        if self.siblings.born:
            self._totals.by_group.index_fill_(0, self._to_gpu(list(self.siblings.born), torch.int64), 0)
            self.siblings.born.clear()

    def _to_gpu(self, values: list[Any], kind: torch.dtype) -> torch.Tensor:
        return async_tensor_h2d(values, device=self._found.device, dtype=kind)

    def _look_up(self, batch: Batch, candidates: int) -> None:
        size = len(batch.slots), candidates, self._splits
        found = self._found[: size[0] * size[1] * size[2]].view(size)
        tables = self.siblings.tables
        scan(tables, batch, found, **self._match)
        weights = Weights(self._weights, self._mean_weight)
        choose(tables, batch, found, rates=self._rates, weights=weights, choice=self.choice, recent=RECENT)

    def _fold(self) -> None:
        """Let the newest counts into the rates. What is not seen for long goes back to its prior and is tried again."""
        self._counts.mul_(KEPT).add_(self._tallies)
        self._tallies.zero_()
        reached, accepted = self._counts
        torch.div(accepted + PRIOR_WEIGHT * self._prior, reached + PRIOR_WEIGHT, out=self._rates)

    def _take_in(self) -> None:
        if self.client and self._page.steps % FETCH_STEPS == 0:
            for other in self.client.fetched():
                self.siblings.receive(Name(other.group, other.request), other.prev_token_count, other.tokens)
        self.siblings.refresh()

    def added(self, request_id: str, slot: int, prompt: list[int], response: list[int], extra: dict[str, Any]) -> None:
        """A request has been given `slot`: its original prompt, and what of its response came with it."""
        group, request, weight = kinship_of(request_id, prompt, extra)
        running = Running(Name(group, request), weight)
        self.siblings.add(slot, running.name, prompt)
        self.newcomers[slot] = weight
        self.running[request_id] = running
        self._weigh()
        if self.client:
            self.client.register_group(group, DEFAULT_TTL_S)
            running.kept += response

    def left(self, request_id: str, slot: int) -> None:
        """A request gives up its slot."""
        running = self.running.pop(request_id, None)
        if running:
            self._weigh()
            if self.client:
                self._hand_on(running)
        self.siblings.retire(slot)

    def _weigh(self) -> None:
        running = self.running.values()
        self._mean_weight = sum(each.weight for each in running) / len(running) if running else 1.0

    def sampled(self, places: dict[str, int], tokens: list[list[int]]) -> None:
        """Let the other engines know what a step has sampled, once the host knows it: each request's place in `tokens`.

        It is called in every step for all requests, so it does no more than it must.
        """
        if self.client:
            for request_id, place in places.items():
                if running := self.running.get(request_id):
                    running.kept += tokens[place]
                    if len(running.kept) >= SHARED_TOKENS:
                        self._hand_on(running)

    def _hand_on(self, running: "Running") -> None:
        tokens, running.kept = running.kept, []
        if tokens and self.client:
            self.client.update(*running.name, running.shared, tokens)
            running.shared += len(tokens)


class Running:
    """A request while it has a slot."""

    def __init__(self, name: Name, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.shared = 0  # tokens of its response that were handed on
        self.kept: list[int] = []  # and those after them


class Page:
    """What the API process sees; the GPU's counts come one page late, so that nobody waits for them."""

    def __init__(self, totals: Totals, siblings: Siblings) -> None:
        self.steps = 0
        self._publisher = Publisher()
        self._gpu, self._siblings = totals, siblings
        self._totals = Totals(*(torch.zeros(of.shape, dtype=of.dtype, pin_memory=of.is_cuda) for of in totals))
        self._groups: dict[str, int] = {}  # the rows of `by_group` on its way
        self._off, self._turns, self._was_off = 0, 0, False
        self._seconds = 0.0

    def step(self, seconds: float, *, off: bool, references: int) -> None:
        """Count a step that the drafter took `seconds` of."""
        self.steps += 1
        self._off += off
        self._turns += off and not self._was_off
        self._was_off = off
        self._seconds += seconds
        if self._publisher.due():
            self._publisher.publish(self._counts() | {"references": references})
            for here, there in zip(self._totals, self._gpu, strict=True):
                here.copy_(there, non_blocking=True)
            born = self._siblings.born  # their rows are still others'
            self._groups = {n: at for n, at in self._siblings.groups(MAX_GROUPS).items() if at not in born}

    def _counts(self) -> dict[str, Any]:
        drafted, accepted = self._totals.by_place.tolist()
        by_group = self._totals.by_group.numpy()
        return {
            "steps": self.steps,
            "steps_off": self._off,
            "switch_offs": self._turns,
            "draft_s": self._seconds,
            "verified": drafted[0],
            "drafted": drafted,
            "accepted": accepted,
            "by_group": {name: by_group[at].tolist() for name, at in self._groups.items() if by_group[at, 0]},
        }


def _shared(slots: int, steps: int, device: torch.device) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Zeros [slots, steps] in the host's memory, as the GPU sees them and as the host does."""
    host = torch.zeros(slots, steps, pin_memory=device.type == "cuda")
    return get_accelerator_view_from_cpu_tensor(host) if host.is_pinned() else host, host.numpy()


def _prior(steps: int) -> torch.Tensor:
    """Chance of each kind's tokens before any was seen, [KINDS, steps]."""
    assert len(PRIOR_BY_LENGTH) == LENGTHS
    assert len(PRIOR_BY_SUPPORT) == SUPPORTS
    rates = torch.outer(torch.tensor(PRIOR_BY_LENGTH), torch.tensor(PRIOR_BY_SUPPORT)).view(KINDS, 1)
    return rates.repeat(1, steps)
