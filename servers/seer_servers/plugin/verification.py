"""Drafts verified by sampling: the policy draws every drafted position itself, and a draft only saves it the step.

vLLM's rejection sampler accepts a drafted token with the policy's probability for it, and otherwise draws from what is
left: the right distribution, but other tokens than without drafts. Here each drafted position is drawn as an undrafted
step would draw it, with that position's own noise (see `seeds`), and the draft is accepted as far as it says the same.
The chance to be accepted is the same.

Invariants: what a request gets does not depend on its drafts: the same distribution always, and with position seeds the
same tokens; the logprobs are those of the distribution that was drawn from, the same as without drafts.

What is left to vLLM's sampler, drafts that come with probabilities, gets another `expand_batch_to_tokens`: its CPU
stand-in writes the temperature, top-k and top-p of drafted rows into a copy and leaves the rows with whatever was in
memory (vLLM issue 55005).
"""

from collections.abc import Iterator
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
    """Draw each request's positions in turn, for as long as its drafts are what is drawn.

    `logits` [drafted tokens + requests, vocabulary] in the order of `metadata`. Returns vLLM's SamplerOutput, with
    tokens [requests, longest draft + 1] and `PLACEHOLDER` where a draft was not followed.
    """
    counts: list[int] = metadata.num_draft_tokens
    order = torch.cat((metadata.target_logits_indices, metadata.bonus_logits_indices))
    shaped = _shaped(sampler, metadata, logits[order].to(torch.float32), sampling)
    rounds = list(_rounds(sampler.sampler, shaped, metadata, sampling))
    grid = [[PLACEHOLDER] * (max(counts) + 1) for _ in counts]
    for offset, drawn in enumerate(rounds):
        for request, token in zip(drawn.requests, drawn.tokens, strict=True):
            grid[request][offset] = token
    tokens = torch.tensor(grid, dtype=torch.int32, device=logits.device)
    logprobs = None
    if sampling.max_num_logprobs is not None:
        if sampler.is_processed_logprobs_mode:
            rows = torch.cat([drawn.processed for drawn in rounds if drawn.processed is not None])
        else:
            rows = logits[order[[row for drawn in rounds for row in drawn.rows]]].to(torch.float32)
        logprobs = _logprobs(sampler, sampling.max_num_logprobs, rows, rounds, tokens)
    return module.SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def _shaped(sampler: Any, metadata: Any, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
    """The logits with penalties, bad words and the like, as they are before temperature; `logits` are used up.

    Rows of drafted positions come first, then each request's row behind its drafts.
    """
    drafted, last = logits.split((len(logits) - len(metadata.num_draft_tokens), len(metadata.num_draft_tokens)))
    # Mostly there is nothing to do, and what comes back is the rows themselves: then nothing is copied.
    # The rows behind the drafts first, as vLLM does it: in that pass a thinking budget finds out where it ends.
    last.copy_(sampler.sampler.apply_logits_processors(last, sampling, predict_bonus_token=True))
    drafted.copy_(sampler.apply_logits_processors(drafted, sampling, metadata))
    return logits


class Round(NamedTuple):
    """One position each of some requests: the rows of its logits, what was drawn, and vLLM's processed logprobs."""

    requests: list[int]
    rows: list[int]
    tokens: list[int]
    processed: torch.Tensor | None


def _rounds(sampler: Any, shaped: torch.Tensor, metadata: Any, sampling: Any) -> Iterator[Round]:
    """Draw the first position of every request, then the next of those whose draft was drawn, and so on.

    What is not reached is not drawn: a row of noise is a logarithm for each token of the vocabulary.
    """
    counts, drafts = metadata.num_draft_tokens, metadata.draft_token_ids.tolist()
    starts = list(accumulate(counts, initial=0))
    following = list(range(len(counts)))
    for offset in range(max(counts) + 1):
        rows = [starts[i] + offset if offset < counts[i] else len(drafts) + i for i in following]
        drawn, processed = sampler.sample(shaped[rows], _of(following, sampling, len(counts)))
        tokens = drawn.tolist()
        yield Round(following, rows, tokens, processed)
        following = [
            request
            for request, row, token in zip(following, rows, tokens, strict=True)
            if offset < counts[request] and token == drafts[row]
        ]
        if not following:
            return
        for request in following:
            if isinstance(source := sampling.generators.get(request), PositionGenerator):
                source.seek(source.position + 1)


def _of(requests: list[int], sampling: Any, batch: int) -> Any:
    """What is needed of the batch's `sampling` to draw for some of its requests."""
    if len(requests) == batch:
        return sampling
    sources = enumerate(map(sampling.generators.get, requests))
    parts = {
        name: None if (values := getattr(sampling, name)) is None else values[requests]
        for name in ("temperature", "top_p", "top_k")
    }
    return replace(sampling, generators={place: source for place, source in sources if source}, **parts)


def _logprobs(sampler: Any, most: int, rows: torch.Tensor, rounds: list[Round], grid: torch.Tensor) -> Any:
    """Logprobs in vLLM's shape: a row for each place of the `grid` of tokens, drawn or not.

    `rows` [tokens drawn, vocabulary] are processed logprobs, or logits.
    """
    if sampler.sampler.logprobs_mode == "raw_logprobs":
        rows = sampler.sampler.compute_logprobs(rows)
    places = [request * grid.shape[1] + offset for offset, drawn in enumerate(rounds) for request in drawn.requests]
    gathered = sampler.sampler.gather_logprobs(rows, most, grid.flatten()[places].to(torch.int64))
    return type(gathered)(*(_scattered(values, places, grid.numel()) for values in gathered[:3]))


def _scattered(values: torch.Tensor, places: list[int], size: int) -> torch.Tensor:
    whole = values.new_zeros((size, *values.shape[1:]))
    whole[places] = values
    return whole
