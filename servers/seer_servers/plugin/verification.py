"""Drafts verified by sampling: the policy draws every drafted position itself, and a draft only saves it the step.

vLLM's rejection sampler accepts a drafted token with the policy's probability for it, and otherwise draws from what is
left: the right distribution, but other tokens than without drafts. Here each drafted position is drawn as an undrafted
step would draw it, with that position's own noise (see `seeds`), and the draft is accepted as far as it says the same.
The chance to be accepted is the same.

Invariants: what a request gets does not depend on its drafts: the same distribution always, and with position seeds the
same tokens; the logprobs are those of the distribution that was drawn from, the same as without drafts.

It also takes the place of `expand_batch_to_tokens`, whose CPU stand-in writes the temperature, top-k and top-p of
drafted rows into a copy and leaves the rows with whatever was in memory (vLLM issue 55005).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from seer_servers.plugin.patching import Function, Patch
from seer_servers.plugin.seeds import PositionGenerator

FORWARD = ("self", "metadata", "draft_probs", "logits", "sampling_metadata")
EXPAND = ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to")
PLACEHOLDER = -1  # vLLM's mark for "no token here"


def v1_patches(rejection_sampler: Any) -> tuple[Patch, ...]:
    """Patches for Model Runner V1, given the module vllm.v1.sample.rejection_sampler."""
    return (
        Patch(rejection_sampler, "expand_batch_to_tokens", EXPAND, lambda _: expand),
        Patch(rejection_sampler.RejectionSampler, "forward", FORWARD, _around_forward(rejection_sampler)),
    )


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its drafted tokens; `x` [requests], result [num_tokens]."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)


def _around_forward(module: Any) -> Any:
    def around(forward: Function) -> Function:
        def _forward(sampler: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
            if draft_probs is not None or sampler.synthetic_mode:
                return forward(sampler, metadata, draft_probs, logits, sampling_metadata)
            return verify(module, sampler, metadata, logits, sampling_metadata)

        return _forward

    return around


def verify(module: Any, sampler: Any, metadata: Any, logits: torch.Tensor, sampling: Any) -> Any:
    """Draw every drafted position and the one after the drafts, and keep what follows from the prefix.

    `logits` [drafted tokens + requests, vocabulary] in the order of `metadata`. Returns vLLM's SamplerOutput, with
    tokens [requests, longest draft + 1] and `PLACEHOLDER` where a draft was not followed.
    """
    processed_mode = sampler.is_processed_logprobs_mode
    bonus = sampler.sampler(
        logits=logits[metadata.bonus_logits_indices],
        sampling_metadata=replace(sampling, max_num_logprobs=None if sampling.max_num_logprobs is None else -1),
        predict_bonus_token=True,
        logprobs_mode_override="processed_logits" if processed_mode else "raw_logits",
    )
    raw = logits[metadata.target_logits_indices].to(torch.float32)
    target = sampler.apply_logits_processors(raw if processed_mode else raw.clone(), sampling, metadata)
    target = module.apply_sampling_constraints(target, metadata.cu_num_draft_tokens, sampling)
    drawn = draw(sampler.sampler, target, metadata, sampling)
    grid = Grid(metadata.num_draft_tokens, target.device)
    tokens = grid.followed(drawn, metadata.draft_token_ids, bonus.sampled_token_ids)
    logprobs = None
    if sampling.max_num_logprobs is not None:
        rows = target if processed_mode else raw
        kept = grid.kept(tokens, rows, bonus.logprobs_tensors.logprobs)
        logprobs = _logprobs(sampler, sampling.max_num_logprobs, kept, tokens.numel())
    return module.SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def draw(sampler: Any, target: torch.Tensor, metadata: Any, sampling: Any) -> torch.Tensor:
    """Tokens for the drafted positions from their final logits `target` [drafted tokens, vocabulary].

    A position behind one that differs from its draft is not drawn, since a row of noise is a logarithm for each token
    of the vocabulary; it holds `PLACEHOLDER`.
    """
    if sampling.all_greedy:
        return target.argmax(dim=-1)
    drafts, counts = metadata.draft_token_ids.tolist(), metadata.num_draft_tokens
    starts = list(accumulate(counts, initial=0))
    drawn = [PLACEHOLDER] * len(drafts)
    following, offset = [request for request, count in enumerate(counts) if count], 0
    while following:
        rows = [starts[request] + offset for request in following]
        sources = {
            place: source
            for place, request in enumerate(following)
            if (source := _source(sampling, request, counts[request] - offset))
        }
        for row, token in zip(rows, _draw(sampler, target[rows], sources, following, sampling), strict=True):
            drawn[row] = token
        offset += 1
        following = [
            request
            for request, row in zip(following, rows, strict=True)
            if drawn[row] == drafts[row] and offset < counts[request]
        ]
    return torch.tensor(drawn, device=target.device)


def _source(sampling: Any, request: int, back: int) -> torch.Generator | None:
    """A seeded request's random source for the position `back` before the one where the bonus token is drawn.

    There a position-seeded source stands.
    """
    source = sampling.generators.get(request)
    return source.at(source.position - back) if isinstance(source, PositionGenerator) else source


def _draw(
    sampler: Any, logits: torch.Tensor, sources: dict[int, torch.Generator], requests: list[int], sampling: Any
) -> list[int]:
    """One token for each row of `logits`, which is of the request at the same place in `requests`."""
    drawn, _ = sampler.topk_topp_sampler(logits, sources, None, None)
    if not sampling.all_random:
        drawn = torch.where(sampling.temperature[requests] == 0, logits.argmax(dim=-1), drawn)
    tokens: list[int] = drawn.tolist()
    return tokens


class Kept(NamedTuple):
    """Tokens that were kept: their places in the flat grid, their ids, and the logits they were drawn from."""

    places: torch.Tensor
    token_ids: torch.Tensor
    logits: torch.Tensor


class Grid:
    """Drafted tokens, flat, laid out as one row a request with a last place for the bonus token."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = torch.tensor(counts, device=device)
        self.width = max(counts) + 1
        self.columns = torch.arange(self.width, device=device)
        self.drafted = self.columns < self.counts[:, None]
        self.bonus = self.columns == self.counts[:, None]

    def followed(self, drawn: torch.Tensor, drafts: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
        """What was drawn, up to and with the first token that is not the draft's; int32 [requests, width]."""
        tokens = torch.full(self.drafted.shape, PLACEHOLDER, dtype=torch.int32, device=drawn.device)
        tokens[self.drafted] = drawn.to(torch.int32)
        tokens[self.bonus] = bonus.flatten().to(torch.int32)
        same = torch.zeros_like(self.drafted)
        same[self.drafted] = drawn == drafts
        reached = torch.ones_like(self.drafted)
        reached[:, 1:] = same[:, :-1].cumprod(dim=1).to(torch.bool)
        return torch.where(reached, tokens, PLACEHOLDER)

    def kept(self, tokens: torch.Tensor, target: torch.Tensor, bonus: torch.Tensor) -> Kept:
        """What is kept of `tokens` [requests, width], with logits: `target` of drafted places, `bonus` of the last."""
        kept = tokens != PLACEHOLDER
        drafted, last = self.drafted & kept, self.bonus & kept
        return Kept(
            places=torch.cat((drafted.flatten().nonzero(), last.flatten().nonzero())).flatten(),
            token_ids=torch.cat((tokens[drafted], tokens[last])).to(torch.int64),
            logits=torch.cat((target[kept[self.drafted]], bonus.to(target.dtype)[kept[self.bonus]])),
        )


def _logprobs(sampler: Any, count: int, kept: Kept, size: int) -> Any:
    """Logprobs of the kept tokens, in vLLM's shape: a row for each of the grid's `size` places, kept or not.

    Only rows of kept tokens are normalised, which is most of the cost.
    """
    rows = kept.logits if sampler.is_logits_logprobs_mode else sampler.sampler.compute_logprobs(kept.logits)
    gathered = sampler.sampler.gather_logprobs(rows, count, kept.token_ids)
    return type(gathered)(*(_scattered(values, kept.places, size) for values in gathered[:3]))


def _scattered(values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    whole = values.new_zeros((size, *values.shape[1:]))
    whole[places] = values
    return whole
