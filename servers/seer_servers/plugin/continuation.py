"""Resubmitted response tokens count as output again, as in one undivided call.

The orchestrator sends a continuation as one long prompt: the original prompt (`seer_prompt_len` tokens) and the
response so far. The scheduler and the KV cache treat it so. The model runner is told the true split, because
penalties, bad words, minimum lengths, thinking budgets and custom logits processors look at prompt and output
separately. The result is the state that vLLM itself builds when a preempted request returns: a known prompt,
some output, and not everything computed yet. `min_tokens` and `max_tokens`, of which the orchestrator sends what
is left, become those of the undivided call.

Left as vLLM has it: requests with prompt embeddings, and requests for prompt logprobs, which the API layer
expects for every token it sent. Not restored, because it lives in the scheduler and not in the model runner:
the state of a structured-output grammar, and repetition detection. Such requests must stay in one call.
"""

import copy
from dataclasses import replace
from typing import Any

from seer_servers.plugin.marker import original_prompt_len
from seer_servers.plugin.patching import Function, Patch

_RESUBMITTED = "seer_resubmitted"  # attribute on V1's CachedRequestState: how many of its outputs came as prompt


def undivided_params(params: Any, resubmitted: int) -> Any:
    """A copy of a continuation's sampling parameters that counts from the original prompt.

    No minimum stays no minimum: it was not asked for, or is already reached.
    """
    whole = copy.copy(params)  # shallow: the scheduler may hold the same object, but nothing in it is changed
    if whole.min_tokens:
        whole.min_tokens += resubmitted
    if whole.max_tokens is not None:
        whole.max_tokens += resubmitted
    return whole


def split_point(request: Any) -> int | None:
    """Where a request's prompt ends and its resubmitted output begins; None if there is nothing to split.

    Takes V1's CachedRequestState or the scheduler's NewRequestData.
    """
    params = request.sampling_params
    point = original_prompt_len(params, request.prompt_token_ids)
    if point is None or point == len(request.prompt_token_ids):
        return None
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return None
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        return None
    return point


def _divide(request: Any, point: int) -> list[int]:
    """Cut the request's prompt at `point`, adapt its parameters and return what was cut off."""
    rest: list[int] = request.prompt_token_ids[point:]
    request.prompt_token_ids = request.prompt_token_ids[:point]
    request.sampling_params = undivided_params(request.sampling_params, len(rest))
    return rest


# Model Runner V1


def _around_post_init(post_init: Function) -> Function:
    def __post_init__(state: Any) -> None:  # noqa: N807 - it replaces the method of that name
        point = split_point(state)
        if point is not None:
            rest = _divide(state, point)
            state.output_token_ids = rest + state.output_token_ids
            setattr(state, _RESUBMITTED, len(rest))
        post_init(state)

    return __post_init__


def _around_update_states(update_states: Function) -> Function:
    """The scheduler counts a continuation's outputs from its long prompt, the runner from the original one.

    Uncorrected, the runner would take the resubmitted tokens for outputs that the scheduler has discarded.
    """

    def _update_states(runner: Any, scheduler_output: Any) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        extra = [getattr(runner.requests[req_id], _RESUBMITTED, 0) for req_id in cached.req_ids]
        if not any(extra):
            return update_states(runner, scheduler_output)
        counts = [count + more for count, more in zip(cached.num_output_tokens, extra, strict=True)]
        # Put back afterwards: others read "no output yet" from these counts, and mean the scheduler's.
        scheduler_output.scheduled_cached_reqs = replace(cached, num_output_tokens=counts)
        try:
            return update_states(runner, scheduler_output)
        finally:
            scheduler_output.scheduled_cached_reqs = cached

    return _update_states


def v1_patches(runner: type, request_state: type) -> tuple[Patch, ...]:
    """Patches for Model Runner V1, given its classes GPUModelRunner and CachedRequestState."""
    return (
        Patch(request_state, "__post_init__", ("self",), _around_post_init),
        Patch(runner, "_update_states", ("self", "scheduler_output"), _around_update_states),
    )


# Model Runner V2


def _around_add_requests(add_requests: Function) -> Function:
    """V2 keeps prompt length and prefill tokens apart, so a shorter prompt is all it has to be told.

    It derives the longest possible sequence as prompt length plus `max_tokens`, which `undivided_params` keeps
    right. A preempted request comes again as a new one, whole, and is split again.
    """

    def _add_requests(runner: Any, scheduler_output: Any) -> Any:
        for request in scheduler_output.scheduled_new_reqs:
            point = split_point(request)
            if point is not None:
                _divide(request, point)
        return add_requests(runner, scheduler_output)

    return _add_requests


def v2_patches(runner: type) -> tuple[Patch, ...]:
    """Patches for Model Runner V2, given its class GPUModelRunner."""
    return (Patch(runner, "add_requests", ("self", "scheduler_output"), _around_add_requests),)
