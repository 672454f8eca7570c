"""Where the grouped drafter meets vLLM: what it is told of each step, and what an engine lets others ask of it.

Steps are touched only on `custom_class` engines with our drafter. The cache salt, which vLLM keeps from its workers,
travels to them in the request's extra arguments, so that requests without metadata are grouped by prompt and salt: on
every engine with the plug-in, because the place where that is done does not know whether the engine drafts. Nobody else
reads it.
"""

import copy
from typing import Any

from seer_servers.plugin.kinship import SALT
from seer_servers.plugin.patching import Function, Patch

PROPOSE = (
    "self",
    "scheduler_output",
    "sampled_token_ids",
    "sampling_metadata",
    "hidden_states",
    "sample_hidden_states",
    "aux_hidden_states",
    "spec_decode_metadata",
    "common_attn_metadata",
    "slot_mappings",
)


def v1_patches(runner: type) -> tuple[Patch, ...]:
    """Patches for Model Runner V1, given its class GPUModelRunner."""
    return (
        Patch(runner, "propose_draft_token_ids", PROPOSE, _around_propose),
        Patch(runner, "_input_fits_in_drafter", ("self", "common_attn_metadata"), _around_fits),
        Patch(runner, "_sample", ("self", "logits", "spec_decode_metadata"), _around_sample),
    )


def scheduler_patches(new_request_data: type) -> tuple[Patch, ...]:
    """Patches for the engine core, given the class NewRequestData."""
    return (
        Patch(
            new_request_data,
            "from_request",
            ("request", "block_ids", "prefill_token_ids", "uses_mrope"),
            _around_request,
        ),
    )


def ours(runner: Any) -> bool:
    """Whether the runner drafts with our proposer."""
    return hasattr(getattr(runner, "drafter", None), "prepare")


def profile_when_warm(worker: Any) -> None:
    """Have our drafter time the model once the worker has warmed it up, before it serves."""
    if not ours(worker.model_runner):
        return
    warm_up = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        result = warm_up()
        worker.model_runner.drafter.profile(worker.model_runner)
        return result

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def _around_propose(propose: Function) -> Function:
    def propose_draft_token_ids(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if ours(runner):
            runner.drafter.prepare(runner, scheduler_output)
        return propose(runner, scheduler_output, *args, **kwargs)

    return propose_draft_token_ids


def _around_fits(fits: Function) -> Function:
    """A drafter without a model of its own fits always: it keeps each request within the model's length itself.

    vLLM would give junk drafts to the whole batch as soon as one request comes close to the end.
    """

    def _input_fits_in_drafter(runner: Any, common_attn_metadata: Any) -> Any:
        return common_attn_metadata is not None if ours(runner) else fits(runner, common_attn_metadata)

    return _input_fits_in_drafter


def _around_sample(sample: Function) -> Function:
    """A step without a draft is sampled as one of an engine that never drafts: its logits are the same rows.

    vLLM's thinking budgets must be told so: on an engine that drafts they take each request's rows to be as many as its
    drafts, none, and put the end of anybody's thinking into row 0.
    """

    def _sample(runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if not ours(runner):
            return sample(runner, logits, spec_decode_metadata)
        drafted = spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens)
        budgets = runner.input_batch.thinking_budget_state_holder
        if budgets is not None:
            budgets.in_spec_mode = drafted
        return sample(runner, logits, spec_decode_metadata if drafted else None)

    return _sample


def _around_request(from_request: Any) -> Any:
    def _from_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        data = from_request(request, *args, **kwargs)
        if data.sampling_params is not None and request.cache_salt:
            data.sampling_params = copy.copy(data.sampling_params)
            data.sampling_params.extra_args = (data.sampling_params.extra_args or {}) | {SALT: request.cache_salt}
        return data

    return _from_request


def configure(runner: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Change the drafter's settings and return them all, or {"status", "error"}; for `collective_rpc`."""
    proposers = (getattr(runner, name, None) for name in ("drafter", "speculator"))  # of either runner
    drafter = next((each for each in proposers if hasattr(each, "settings")), None)  # vLLM's own have none
    if drafter is None:
        return {"status": 404, "error": "This engine was started without grouped drafting."}
    try:
        drafter.configure(**changes)
    except ValueError as error:
        return {"status": 400, "error": str(error)}
    settings: dict[str, Any] = drafter.settings()
    return settings
