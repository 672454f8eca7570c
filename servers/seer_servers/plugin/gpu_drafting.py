"""Where the grouped drafter of Model Runner V2 meets vLLM.

It takes the place of vLLM's GPU n-gram drafter when the engine is started with

    --speculative-config '{"method": "ngram_gpu", "num_speculative_tokens": 8, "prompt_lookup_min": 1,
                           "prompt_lookup_max": 16, "enable_adaptive_verification": true}'
    --additional-config '{"seer_drafts": true}'

Invariant: all patches fit or none is applied; then vLLM's own drafter runs.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from seer_servers.plugin import gpu_switch, gpu_verification
from seer_servers.plugin.gpu_admission import Admission
from seer_servers.plugin.gpu_kernels import LONGEST_ROW
from seer_servers.plugin.gpu_speculator import GroupedSpeculator
from seer_servers.plugin.patching import Function, Patch, UnsupportedVllmError, apply_all

WANTED = "seer_drafts"  # in vLLM's additional_config


def wanted(config: Any) -> bool:
    """Whether the engine was started for grouped drafting in this runner."""
    return bool((config.additional_config or {}).get(WANTED))


def install(config: Any) -> None:
    """Patch this worker's process, before it builds its model runner.

    Raises:
        UnsupportedVllmError: this vLLM or this configuration does not allow it.
    """
    spec, parallel = config.speculative_config, config.parallel_config
    if spec is None or spec.method != "ngram_gpu" or not spec.enable_adaptive_verification:
        raise UnsupportedVllmError('grouped drafting needs method "ngram_gpu" with enable_adaptive_verification')
    if parallel.world_size > 1:
        raise UnsupportedVllmError("grouped drafting is not tried with more than one GPU per engine")
    if parallel.distributed_executor_backend != "uni":  # the switch is the scheduler's, in whose process this must be
        raise UnsupportedVllmError("grouped drafting needs the worker in the engine's process (executor backend uni)")
    if config.model_config.max_model_len >= LONGEST_ROW:
        raise UnsupportedVllmError("grouped drafting does not reach so long a context")
    _apply()


@functools.cache  # vLLM may call the plug-in again in the same process
def _apply() -> None:
    apply_all((*patches(), *gpu_verification.patches(), *gpu_switch.patches()))


def patches() -> tuple[Patch, ...]:
    """Patches that put the drafter into Model Runner V2."""
    cache = ("self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context")
    return (
        Patch(model_runner, "init_speculator", ("vllm_config", "device", "req_states"), _around_init),
        Patch(GPUModelRunner, "initialize_kv_cache", cache, _around_initialize_kv_cache),
        Patch(GPUModelRunner, "add_requests", ("self", "scheduler_output"), _around_add_requests),
        Patch(GPUModelRunner, "_remove_request", ("self", "req_id"), _around_remove_request),
        Patch(GPUModelRunner, "sample_tokens", ("self", "grammar_output"), _around_sample_tokens),
        Patch(AsyncOutput, "get_output", ("self",), _around_get_output),
    )


def _around_init(_: Function) -> Function:
    def init_speculator(*arguments: Any) -> GroupedSpeculator:
        speculator = GroupedSpeculator(*arguments)
        gpu_switch.listen_to(speculator)
        return speculator

    return init_speculator


def _around_initialize_kv_cache(initialize: Function) -> Function:
    def initialize_kv_cache(runner: Any, *arguments: Any, **keywords: Any) -> None:
        initialize(runner, *arguments, **keywords)
        if runner.adaptive_verification is not None:
            runner.adaptive_verification = Admission(runner.adaptive_verification, runner)

    return initialize_kv_cache


def _around_add_requests(add_requests: Function) -> Function:
    def _add_requests(runner: Any, scheduler_output: Any) -> None:
        add_requests(runner, scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            slot = runner.req_states.req_id_to_index[request.req_id]
            prompt_len = int(runner.req_states.prompt_len.np[slot])
            tokens = request.prefill_token_ids
            extra = (request.sampling_params and request.sampling_params.extra_args) or {}
            runner.speculator.added(request.req_id, slot, tokens[:prompt_len], tokens[prompt_len:], extra)

    return _add_requests


def _around_remove_request(remove_request: Function) -> Function:
    def _remove_request(runner: Any, req_id: str) -> bool:
        slot = runner.req_states.req_id_to_index.get(req_id)
        if slot is not None:
            runner.speculator.left(req_id, slot)
        return bool(remove_request(runner, req_id))

    return _remove_request


def _around_sample_tokens(sample_tokens: Function) -> Function:
    def _sample_tokens(runner: Any, grammar_output: Any) -> Any:
        speculator = runner.speculator
        if runner.execute_model_state is None or not isinstance(speculator, GroupedSpeculator):
            return sample_tokens(runner, grammar_output)
        with _spared(runner, speculator):
            output = sample_tokens(runner, grammar_output)
        if isinstance(output, AsyncOutput):
            output.seer_parts = speculator, runner.adaptive_verification
        return output

    return _sample_tokens


@contextlib.contextmanager
def _spared(runner: Any, speculator: GroupedSpeculator) -> Iterator[None]:
    """Spare a step what it does not need of speculation: scattering and gathering drafts takes the host's time.

    A step that neither has drafts nor asks for any ends as on a runner that does not speculate. The drafts of another
    are gathered for structured outputs alone, and those beyond what was asked for are not struck out: the scheduler
    has no places for them.
    """
    batch, asked = runner.execute_model_state.input_batch, runner.execute_model_state.num_spec_tokens_to_schedule
    rests = asked == 0 and batch.num_draft_tokens == 0
    if not rests and batch.has_structured_output_reqs:
        yield
        return
    steps, runner.num_speculative_steps = runner.num_speculative_steps, 0
    runner.speculator = None if rests else speculator
    try:
        yield
    finally:
        runner.speculator, runner.num_speculative_steps = speculator, steps
    drafts = runner.draft_tokens_handler
    drafts.req_ids, drafts.num_draft_tokens, drafts.draft_tokens_np = batch.req_ids, asked, None
    if rests:
        speculator.rest(batch)
        if isinstance(runner.adaptive_verification, Admission):
            runner.adaptive_verification.rest()


def _around_get_output(get_output: Function) -> Function:
    def _get_output(output: Any) -> Any:
        begin = time.perf_counter()
        result = get_output(output)
        speculator, verification = getattr(output, "seer_parts", (None, None))
        if speculator is not None:
            if isinstance(verification, Admission):
                verification.waited(time.perf_counter() - begin)
            speculator.sampled(result.req_id_to_index, result.sampled_token_ids)
        return result

    return _get_output
