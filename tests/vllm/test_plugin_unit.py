"""The plug-in against vLLM's real classes, without an engine."""

import copy
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerWrapperBase

import seer_servers.plugin
from seer_servers.plugin import continuation, patching, seeds, worker
from seer_servers.plugin.marker import original_prompt_len

VOCAB = 64
PROMPT = [1, 2, 3, 4, 5]
RESPONSE = [9, 9, 8, 7, 9, 6]


def config(*, v2=False, speculative=None):
    return SimpleNamespace(use_v2_model_runner=v2, speculative_config=speculative)


@pytest.fixture(scope="module", autouse=True)
def installed():
    assert worker.support(config())["capabilities"] == ["position_seeds", "continuation"]


def params(prompt_len=5, **fields):  # the length of PROMPT
    marked = {"extra_args": {"seer_prompt_len": prompt_len}} if prompt_len is not None else {}
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 20, **marked, **fields})


def state(token_ids, sampling_params, **fields):
    seed = sampling_params.seed
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    defaults = {"mm_features": [], "block_ids": ([0],), "num_computed_tokens": 0, "output_token_ids": []}
    return CachedRequestState(
        req_id="r",
        prompt_token_ids=token_ids,
        sampling_params=sampling_params,
        generator=generator,
        **{**defaults, **fields},
    )


def batch(request):
    rows = InputBatch(
        max_num_reqs=4,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=VOCAB,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
    )
    rows.add_request(request)
    rows.refresh_metadata()
    return rows


def undivided(sampling_params):
    """What the runner holds when one call has already generated RESPONSE."""
    return state(PROMPT, sampling_params, output_token_ids=list(RESPONSE))


def penalised(request):
    metadata = batch(request).sampling_metadata
    logits = torch.linspace(-1, 1, VOCAB).repeat(1, 1)
    return apply_all_penalties(
        logits,
        metadata.prompt_token_ids,
        metadata.presence_penalties,
        metadata.frequency_penalties,
        metadata.repetition_penalties,
        metadata.output_token_ids,
    )


def draw(request):
    """The token that vLLM's own sampler draws next for this request, from flat probabilities."""
    rows = batch(request)
    seeds.seek_rows(rows)
    return int(random_sample(torch.full((1, VOCAB), 1 / VOCAB), rows.generators))


class TestMarker:
    @pytest.mark.parametrize("mark", [0, -1, 6, "5", 5.0, True, None, [5]])
    def test_what_is_not_a_length_within_the_prompt_is_no_mark(self, mark):
        extra_args = {"extra_args": {"seer_prompt_len": mark}}
        assert original_prompt_len(params(None, **extra_args), PROMPT) is None

    def test_requests_without_a_mark(self):
        assert original_prompt_len(params(None), PROMPT) is None
        assert original_prompt_len(params(), None) is None
        assert original_prompt_len(None, PROMPT) is None

    def test_a_first_chunk_is_marked_too(self):
        assert original_prompt_len(params(), PROMPT) == len(PROMPT)


class TestNoise:
    def test_it_is_splitmix64(self):
        assert seeds._scramble(0) == 0xE220A8397B1DCDAF  # the published first output for state 0

    def test_neighbours_differ_in_half_of_the_low_bits(self):
        flips = [
            ((seeds.noise_seed(s, p) ^ neighbour) & 0xFFFFFFFF).bit_count()
            for s in (0, 1, 7, -3, 2**63 - 1)
            for p in range(400)
            for neighbour in (seeds.noise_seed(s, p + 1), seeds.noise_seed(s + 1, p))
        ]
        assert 15.8 < sum(flips) / len(flips) < 16.2

    def test_no_two_of_many_seeds_and_positions_share_their_noise(self):
        words = {seeds.noise_seed(s, p) for s in range(-150, 150) for p in range(400)}
        assert len(words) == 300 * 400

    def test_draws_depend_on_the_position_alone(self):
        generator = seeds.PositionGenerator(3, torch.device("cpu"))
        generator.seek(10)
        expected = torch.rand(4, generator=generator)
        generator.seek(11)
        assert not torch.equal(torch.rand(4, generator=generator), expected)
        generator.seek(10)
        assert torch.equal(torch.rand(4, generator=generator), expected)

    def test_a_rewind_does_nothing_where_a_plain_cpu_generator_raises(self):
        with pytest.raises(RuntimeError, match="offset"):
            torch.Generator().get_offset()
        generator = seeds.PositionGenerator(3, torch.device("cpu"))
        generator.set_offset(generator.get_offset() - 4)

    def test_a_continuation_draws_what_the_undivided_call_draws(self):
        assert [
            draw(state(PROMPT + RESPONSE, params(seed=s))) == draw(undivided(params(seed=s))) for s in range(20)
        ] == [True] * 20

    def test_a_request_without_the_mark_keeps_its_own_generator(self):
        request = state(PROMPT, params(None, seed=4))
        assert type(request.generator) is torch.Generator
        stock = int(random_sample(torch.full((1, VOCAB), 1 / VOCAB), {0: torch.Generator().manual_seed(4)}))
        assert draw(request) == stock

    def test_rows_follow_their_request_when_the_batch_is_reordered(self):
        rows = batch(state(PROMPT, params(seed=1)))
        other = state(PROMPT + RESPONSE, params(seed=2))
        other.req_id = "other"
        rows.add_request(other)
        rows.swap_states(0, 1)
        seeds.seek_rows(rows)
        expected = seeds.PositionGenerator(2, torch.device("cpu"))
        expected.seek(len(PROMPT + RESPONSE))
        assert torch.equal(torch.rand(3, generator=rows.generators[0]), torch.rand(3, generator=expected))


class TestContinuationV1:
    def test_the_runner_sees_prompt_and_output_of_the_undivided_call(self):
        request = state(PROMPT + RESPONSE, params())
        assert (request.prompt_token_ids, request.output_token_ids) == (PROMPT, RESPONSE)
        assert (request.num_prompt_tokens, request.num_tokens) == (5, 11)

    def test_penalties_are_those_of_the_undivided_call(self):
        fields = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.3}
        expected = penalised(undivided(params(None, **fields)))
        assert torch.equal(penalised(state(PROMPT + RESPONSE, params(**fields))), expected)
        assert not torch.equal(penalised(state(PROMPT + RESPONSE, params(None, **fields))), expected)

    def test_remaining_lengths_become_total_ones_on_a_copy(self):
        sent = params(min_tokens=4, max_tokens=10)
        whole = state(PROMPT + RESPONSE, sent).sampling_params
        assert (whole.min_tokens, whole.max_tokens) == (4 + 6, 10 + 6)
        assert (sent.min_tokens, sent.max_tokens) == (4, 10)

    def test_a_minimum_already_reached_stays_reached(self):
        assert state(PROMPT + RESPONSE, params(min_tokens=0)).sampling_params.min_tokens == 0

    def test_stop_tokens_stay_masked_until_the_minimum(self):
        request = state(PROMPT + RESPONSE, params(min_tokens=2))
        hold = MinTokensLogitsProcessor.add_request(request.sampling_params, None, request.output_token_ids)
        assert hold is not None
        assert hold[0] - len(request.output_token_ids) == 2

    @pytest.mark.parametrize("prompt_len", [None, len(PROMPT + RESPONSE), 99])
    def test_no_mark_a_first_chunk_and_a_bad_mark_change_nothing(self, prompt_len):
        sent = params(prompt_len, min_tokens=2)
        request = state(PROMPT + RESPONSE, sent)
        assert request.prompt_token_ids == PROMPT + RESPONSE
        assert request.output_token_ids == []
        assert request.sampling_params is sent

    @pytest.mark.parametrize("field", ["prompt_logprobs", "prompt_logprob_token_ids"])
    def test_prompt_logprobs_keep_the_whole_prompt(self, field):
        sent = params()
        setattr(sent, field, 1)
        assert state(PROMPT + RESPONSE, sent).prompt_token_ids == PROMPT + RESPONSE

    def test_mixed_embeddings_keep_the_whole_prompt(self):
        tokens = PROMPT + RESPONSE
        assert state(tokens, params(), prompt_is_token_ids=[True] * len(tokens)).prompt_token_ids == tokens


def bare_runner(request, *, asynchronous):
    """A real GPUModelRunner with just what `_update_states` touches."""
    runner = GPUModelRunner.__new__(GPUModelRunner)
    vars(runner).update(
        requests={"r": request},
        input_batch=batch(request),
        num_prompt_logprobs={},
        late_interaction_runner=SimpleNamespace(on_requests_finished=lambda _: None),
        encoder_cache={},
        speculative_config=None,
        use_async_spec_decode=False,
        use_async_scheduling=asynchronous,
        device=torch.device("cpu"),
        _may_reorder_batch=lambda _: None,
    )
    return runner


def step(*, generated, resumed=False, all_token_ids=None):
    """The scheduler's message about request "r", of which it knows `generated` outputs."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {"r": 1}
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=["r"],
        resumed_req_ids={"r"} if resumed else set(),
        new_token_ids=[],
        all_token_ids={"r": all_token_ids} if all_token_ids else {},
        new_block_ids=[([1],)],
        num_computed_tokens=[len(PROMPT + RESPONSE)],
        num_output_tokens=[generated],
    )
    return output


class TestUpdateStates:
    @pytest.fixture(autouse=True)
    def _one_pipeline_stage(self, monkeypatch):
        monkeypatch.setattr(gpu_model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))

    def test_resubmitted_tokens_are_not_taken_for_discarded_ones(self):
        request = state(PROMPT + RESPONSE, params())
        request.output_token_ids.append(30)
        message = step(generated=1)
        bare_runner(request, asynchronous=False)._update_states(message)
        assert request.output_token_ids == [*RESPONSE, 30]
        assert message.scheduled_cached_reqs.num_output_tokens == [1]  # as the scheduler sent it

    def test_without_the_patch_they_are(self):
        request = state(PROMPT + RESPONSE, params())
        request.output_token_ids.append(30)
        runner = bare_runner(request, asynchronous=False)
        GPUModelRunner._update_states.__wrapped__(runner, step(generated=1))
        assert request.output_token_ids != [*RESPONSE, 30]

    def test_a_token_that_really_was_discarded_goes(self):
        request = state(PROMPT + RESPONSE, params())
        request.output_token_ids += [30, 31]
        runner = bare_runner(request, asynchronous=False)
        runner._update_states(step(generated=1))
        assert request.output_token_ids == [*RESPONSE, 30]
        assert runner.input_batch.num_tokens_no_spec[0] == len(PROMPT + RESPONSE) + 1

    def test_async_scheduling_restores_output_after_preemption(self):
        request = state(PROMPT + RESPONSE, params(seed=1))
        request.output_token_ids += [-1, -1]  # placeholders of tokens still on the device
        runner = bare_runner(request, asynchronous=True)
        runner.input_batch.remove_request("r")
        runner.input_batch.condense()
        runner._update_states(step(generated=2, resumed=True, all_token_ids=[*PROMPT, *RESPONSE, 30, 31]))
        assert request.output_token_ids == [*RESPONSE, 30, 31]
        assert runner.input_batch.num_tokens_no_spec[0] == len(PROMPT + RESPONSE) + 2


class TestContinuationV2:
    @pytest.fixture
    def added(self):
        """A runner's `add_requests` under the patch; returns the requests it got."""

        class Runner:
            def add_requests(self, scheduler_output):
                return scheduler_output.scheduled_new_reqs

        patching.apply_all(continuation.v2_patches(Runner))
        return lambda *requests: Runner().add_requests(SimpleNamespace(scheduled_new_reqs=requests))

    def new_request(self, sampling_params, tokens=(*PROMPT, *RESPONSE), generated=()):
        return NewRequestData(
            req_id="r",
            prompt_token_ids=list(tokens),
            mm_features=[],
            sampling_params=sampling_params,
            pooling_params=None,
            block_ids=([0],),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=[*tokens, *generated],
        )

    def test_prompt_length_shrinks_and_the_longest_sequence_stays(self, added):
        sent = params(max_tokens=10, min_tokens=4)
        (request,) = added(self.new_request(sent))
        assert request.prompt_len == len(PROMPT)
        assert request.prefill_token_ids == PROMPT + RESPONSE
        assert request.prompt_len + request.sampling_params.max_tokens == len(PROMPT + RESPONSE) + 10
        assert request.prompt_len + request.sampling_params.min_tokens == len(PROMPT + RESPONSE) + 4
        assert (sent.max_tokens, sent.min_tokens) == (10, 4)

    def test_a_preempted_continuation_is_split_at_the_same_place(self, added):
        (request,) = added(self.new_request(params(), generated=[30, 31]))
        assert request.prompt_token_ids == PROMPT
        assert request.prefill_token_ids == [*PROMPT, *RESPONSE, 30, 31]

    def test_others_pass_untouched(self, added):
        sent = self.new_request(params(None))
        before = copy.deepcopy(sent)
        assert added(sent) == (before,)


class TestInstallation:
    def test_nothing_is_wrapped_unless_everything_fits(self):
        class Runner:
            def good(self, a):
                return a

            def changed(self, a, b):
                return a + b

        good, changed = Runner.good, Runner.changed
        for name, parameters in (("changed", ("self", "a")), ("gone", ("self",))):
            patches = (
                patching.Patch(Runner, "good", ("self", "a"), lambda f: f),
                patching.Patch(Runner, name, parameters, lambda f: f),
            )
            with pytest.raises(patching.UnsupportedVllmError, match=name):
                patching.apply_all(patches)
            assert (Runner.good, Runner.changed) == (good, changed)

    def test_it_happens_once(self):
        before = (GPUModelRunner._sample, GPUModelRunner._update_states, CachedRequestState.__post_init__)
        worker.support(config())
        after = (GPUModelRunner._sample, GPUModelRunner._update_states, CachedRequestState.__post_init__)
        assert before == after

    def test_registering_twice_wraps_the_worker_once(self):
        seer_servers.plugin.register()
        first = WorkerWrapperBase.init_device
        seer_servers.plugin.register()
        assert WorkerWrapperBase.init_device is first
        assert first.__wrapped__.__module__ == "vllm.v1.worker.worker_base"

    def test_another_vllm_gets_one_warning_and_no_capability(self, monkeypatch, caplog):
        monkeypatch.setattr(worker.vllm, "__version__", "0.33.0")
        monkeypatch.setattr(worker.logger, "propagate", True)
        with caplog.at_level(logging.WARNING, logger="vllm.seer"):
            assert worker.support(config())["capabilities"] == []
        assert [r.getMessage().split(" is off")[0] for r in caplog.records] == [
            "Seer capability position_seeds",
            "Seer capability continuation",
        ]

    def test_drafts_keep_the_promise_about_seeds(self):
        held = worker.support(config(speculative=object()))["capabilities"]
        assert held == ["position_seeds", "continuation", "drafts"]

    def test_a_failure_does_not_reach_vllm(self, monkeypatch, caplog):
        monkeypatch.setattr(worker, "hook", lambda: 1 / 0)
        seer_servers.plugin.register()
        assert "stays off" in caplog.text
