"""Drafts change nothing: the same tokens where noise is keyed by position, the same distribution everywhere.

The model is a table of logits by the last two tokens, so that a whole engine fits into a test; samplers are vLLM's own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

pytest.importorskip("vllm", reason="these are vLLM's samplers")

import torch
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from seer_servers.plugin import drafting, seeds, verification
from tests.chisquare import p_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCAB = 24
CPU = torch.device("cpu")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "top-k": {"top_k": 5},
    "penalties": {"presence": 0.4, "frequency": 0.3, "repetition": 1.2},
    "bad words": {"bad_words": [[3], [5, 7]]},
    "all": {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "presence": 0.5, "repetition": 1.1, "bad_words": [[2]]},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    for patch in verification.v1_patches(rejection_sampler):
        patch.check()
        monkeypatch.setattr(patch.owner, patch.name, patch.around(getattr(patch.owner, patch.name)))


def model(tokens: Sequence[int]) -> torch.Tensor:
    source = torch.Generator().manual_seed(tokens[-1] * 31 + tokens[-2])
    return torch.randn(VOCAB, generator=source) * 2


def sampling(prompts: list[list[int]], outputs: list[list[int]], drafts: list[list[int]] | None, **opt: Any) -> Any:
    rows = len(prompts)
    temperature = opt.get("temperature", 1.0)
    penalised = bool({"presence", "frequency", "repetition"} & opt.keys())
    every = lambda value: torch.full((rows,), value, dtype=torch.float32)  # noqa: E731 - read in place
    padded = torch.full((rows, max(map(len, prompts))), VOCAB)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    return SamplingMetadata(
        temperature=None if temperature == 0 else every(temperature),
        all_greedy=temperature == 0,
        all_random=temperature != 0,
        top_p=every(opt["top_p"]) if "top_p" in opt else None,
        top_k=torch.full((rows,), opt["top_k"], dtype=torch.int32) if "top_k" in opt else None,
        generators=opt.get("generators", {}),
        max_num_logprobs=2,
        no_penalties=not penalised,
        prompt_token_ids=padded if penalised else None,
        frequency_penalties=every(opt.get("frequency", 0.0)),
        presence_penalties=every(opt.get("presence", 0.0)),
        repetition_penalties=every(opt.get("repetition", 1.0)),
        output_token_ids=outputs,
        allowed_token_ids_mask=None,
        bad_words_token_ids=dict.fromkeys(range(rows), opt["bad_words"]) if "bad_words" in opt else {},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=drafts,
        thinking_budget_state_holder=opt.get("budgets"),
    )


class Tiny:
    """An engine of one model and a batch of requests; `drafter` guesses what comes next."""

    def __init__(self, mode: str, options: dict[str, Any], *, seeded: bool = True) -> None:
        self.sampler = Sampler(logprobs_mode=mode)
        self.rejection = rejection_sampler.RejectionSampler(self.sampler)
        self.options = options
        self.prompts = [[1, 2], [3, 4, 5], [6, 7], [8, 9, 10, 11]]
        self.outputs: list[list[int]] = [[] for _ in self.prompts]
        self.logprobs: list[list[tuple[int, float]]] = [[] for _ in self.prompts]
        self.generators: dict[int, torch.Generator] = (
            {row: seeds.PositionGenerator(row + 5, CPU) for row in range(4)} if seeded else {}
        )

    def step(self, drafts: list[list[int]]) -> None:
        texts = [prompt + output for prompt, output in zip(self.prompts, self.outputs, strict=True)]
        for row, generator in self.generators.items():
            if isinstance(generator, seeds.PositionGenerator):
                generator.seek(len(texts[row]))
        rows = [
            model(text + draft[:i]) for text, draft in zip(texts, drafts, strict=True) for i in range(len(draft) + 1)
        ]
        metadata = sampling(self.prompts, self.outputs, drafts, generators=self.generators, **self.options)
        flat = torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32)
        out = self._sample(torch.stack(rows), metadata, described(drafts, flat))
        if not any(drafts):
            self._keep([[int(token)] for (token,) in out.sampled_token_ids], out.logprobs_tensors.tolists().logprobs)
            return
        tokens, lists = self.rejection.parse_output(out.sampled_token_ids, VOCAB, logprobs_tensors=out.logprobs_tensors)
        self._keep(tokens, lists.logprobs)

    def _sample(self, logits: torch.Tensor, metadata: Any, spec: Any) -> Any:
        """What vLLM's runner does, with our patch around it."""

        def sample(_: Any, logits: torch.Tensor, spec: Any) -> Any:
            return self.rejection(spec, None, logits, metadata) if spec else self.sampler(logits, metadata)

        (patch,) = (patch for patch in drafting.v1_patches(object) if patch.name == "_sample")
        batch = SimpleNamespace(thinking_budget_state_holder=self.options.get("budgets"))
        runner = SimpleNamespace(drafter=SimpleNamespace(prepare=None), input_batch=batch)
        return patch.around(sample)(runner, logits, spec)

    def _keep(self, tokens: list[list[int]], logprobs: Any) -> None:
        at = 0
        for row, new in enumerate(tokens):
            self.logprobs[row] += [(token, float(logprobs[at + i][0])) for i, token in enumerate(new)]
            self.outputs[row] += new
            at += len(new)


def described(drafts: list[list[int]], flat: torch.Tensor) -> SpecDecodeMetadata:
    counts = torch.tensor([len(draft) for draft in drafts])
    ends = (counts + 1).cumsum(0)
    starts = ends - counts - 1
    target = torch.cat([torch.arange(s, s + c) for s, c in zip(starts.tolist(), counts.tolist(), strict=True)])
    return SpecDecodeMetadata(
        draft_token_ids=flat,
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=counts.cumsum(0).to(torch.int32),
        cu_num_sampled_tokens=ends.to(torch.int32),
        target_logits_indices=target,
        bonus_logits_indices=ends - 1,
        logits_indices=torch.arange(int(ends[-1])),
    )


def grown(mode: str, options: dict[str, Any], length: int, guess: Callable[[int, int], list[int]]) -> Tiny:
    tiny = Tiny(mode, options)
    while min(map(len, tiny.outputs)) < length:
        tiny.step([guess(row, len(output)) for row, output in enumerate(tiny.outputs)])
    return tiny


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logprobs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_tokens_and_logprobs_as_without_drafts(patched: None, options: dict[str, Any], mode: str) -> None:
    truth = grown(mode, options, 60, lambda *_: [])
    noise = torch.Generator().manual_seed(0)

    def guess(row: int, at: int) -> list[int]:
        """What really comes next, spoilt somewhere or not at all; of any length, also none."""
        count = int(torch.randint(0, 6, (1,), generator=noise))
        right = truth.outputs[row][at : at + count]
        spoilt = int(torch.randint(0, 8, (1,), generator=noise))
        return [(token + (i == spoilt)) % VOCAB for i, token in enumerate(right)]

    drafted = grown(mode, options, 50, guess)
    for row in range(4):
        assert drafted.outputs[row][:50] == truth.outputs[row][:50]
        for (token, logprob), (_, expected) in zip(drafted.logprobs[row][:50], truth.logprobs[row][:50], strict=True):
            assert logprob == pytest.approx(expected, abs=1e-5), token


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_a_seed_that_is_not_keyed_by_position_gives_the_same_too(patched: None, options: dict[str, Any]) -> None:
    """Each token takes its noise in turn, and what is not kept takes none."""

    def tiny(guess: Callable[[int, int], list[int]]) -> Tiny:
        tiny = Tiny("raw_logprobs", options, seeded=False)
        tiny.generators = {row: torch.Generator().manual_seed(row) for row in range(4)}
        while min(map(len, tiny.outputs)) < 40:
            tiny.step([guess(row, len(output)) for row, output in enumerate(tiny.outputs)])
        return tiny

    truth = tiny(lambda *_: [])
    drafted = tiny(lambda row, at: [*truth.outputs[row][at : at + row], 0])
    assert [output[:40] for output in drafted.outputs] == [output[:40] for output in truth.outputs]


THINK, DONE = 20, 21
BUDGETS = (None, 3, 7, 5)  # tokens; the first request may think as long as it likes


@pytest.mark.parametrize("every", [1, 2, 3, 1000])
def test_thinking_ends_where_its_budget_does(patched: None, every: int) -> None:
    """With drafts in one of so many steps. The model itself never says that it has done with thinking."""

    def thinking(drafted: int, guess: Callable[[int, int], list[int]]) -> list[list[int]]:
        marks = SimpleNamespace(reasoning_start_token_ids=[THINK], reasoning_end_token_ids=[DONE])
        budgets = ThinkingBudgetStateHolder(marks, 4, drafted, CPU, is_pin_memory=False)
        tiny = Tiny("raw_logprobs", {"bad_words": [[THINK], [DONE]], "budgets": budgets})
        tiny.prompts = [[*prompt, THINK] for prompt in tiny.prompts]
        asked = [SimpleNamespace(thinking_token_budget=budget) for budget in BUDGETS]
        rows = zip(range(4), asked, tiny.prompts, tiny.outputs, strict=True)
        budgets.sync_batch(BatchUpdate(batch_size=4, removed=[], added=list(rows), moved=[]))
        tiny.step([[]] * 4)  # a prompt's step has no drafts
        for step in range(1, 40):
            tiny.step([guess(row, len(tiny.outputs[row])) if step % every == 0 else [] for row in range(4)])
        return tiny.outputs

    truth = thinking(0, lambda *_: [])
    for output, budget in zip(truth, BUDGETS, strict=True):
        assert [place for place, token in enumerate(output) if token == DONE] == ([] if budget is None else [budget])
    noise = torch.Generator().manual_seed(every)

    def guess(row: int, at: int) -> list[int]:
        count, spoilt = torch.randint(0, 6, (2,), generator=noise).tolist()
        return [(token + (i == spoilt)) % VOCAB for i, token in enumerate(truth[row][at : at + count])]

    for drafted, plain in zip(thinking(5, guess), truth, strict=True):
        assert drafted[: len(plain)] == plain[: len(drafted)]


def test_a_padding_draft_is_never_accepted(patched: None) -> None:
    tiny = Tiny("raw_logprobs", {})
    tiny.step([[-1, -1], [], [-1], []])
    assert [len(output) for output in tiny.outputs] == [1, 1, 1, 1]


def test_what_is_not_reached_is_not_drawn(patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of noise are most of what a drafted token costs the sampler."""
    truth = grown("raw_logprobs", {}, 20, lambda *_: [])
    tiny = Tiny("raw_logprobs", {})
    plain, rows = tiny.sampler.topk_topp_sampler.forward, []

    def counted(logits: torch.Tensor, *others: Any) -> Any:
        rows.append(len(logits))
        return plain(logits, *others)

    monkeypatch.setattr(tiny.sampler.topk_topp_sampler, "forward", counted)
    wrong = [(token + 1) % VOCAB for token in truth.outputs[3]]
    tiny.step([truth.outputs[0][:5], [*truth.outputs[1][:2], wrong[2], 0, 0], [], wrong[:5]])
    assert [len(output) for output in tiny.outputs] == [6, 3, 1, 1]
    assert sum(rows) == 6 + 3 + 1 + 1  # no more than are kept


class TestDistribution:
    """A batch of equal rows is as many samples; chi-square against the exact probabilities."""

    ROWS = 20_000
    DRAFT = (int(model([1, 2]).topk(2).indices[1]), 9)  # the second likeliest token, and any
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {},
        "cold": {"temperature": 0.6},
        "top-p": {"top_p": 0.8},
        "top-k": {"top_k": 6},
        "presence": {"presence": 1.5},
        "repetition": {"repetition": 1.5},
        "all": {"temperature": 0.6, "top_p": 0.8, "top_k": 6, "presence": 0.5, "frequency": 0.5, "repetition": 1.2},
    }

    def policy(self, output: list[int], **options: Any) -> torch.Tensor:
        """The exact probabilities of the token after [1, 2] and `output`, by the options' definitions."""
        text = [1, 2, *output]
        logits = model(text)
        for token in set(text):
            factor = options.get("repetition", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(output):
            logits[token] -= options.get("presence", 0.0) + options.get("frequency", 0.0) * output.count(token)
        logits = logits / options.get("temperature", 1.0)
        logits[logits < logits.topk(options.get("top_k", VOCAB)).values[-1]] = -torch.inf
        likeliest, order = logits.softmax(-1).sort(descending=True)
        logits[order[likeliest.cumsum(0) - likeliest >= options.get("top_p", 1.0)]] = -torch.inf
        return logits.softmax(-1)

    def counts(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """How often each token came first, and second after the first draft was followed."""
        texts = [[1, 2]] * self.ROWS
        drafts = [list(self.DRAFT)] * self.ROWS
        rows = torch.stack([model([1, 2]), model([2, self.DRAFT[0]]), model(self.DRAFT)]).repeat(self.ROWS, 1)
        metadata = sampling(texts, [[]] * self.ROWS, drafts, **options)
        flat = torch.tensor(self.DRAFT, dtype=torch.int32).repeat(self.ROWS)
        rejection = rejection_sampler.RejectionSampler(Sampler(logprobs_mode="processed_logprobs"))
        tokens = rejection(described(drafts, flat), None, rows, metadata).sampled_token_ids.long()
        first = torch.bincount(tokens[:, 0], minlength=VOCAB)
        followed = tokens[tokens[:, 0] == self.DRAFT[0], 1]
        return first, torch.bincount(followed[followed >= 0], minlength=VOCAB)

    @pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
    def test_it_is_the_policys(self, patched: None, options: dict[str, Any]) -> None:
        torch.manual_seed(1)
        first, second = self.counts(**options)
        assert second.sum() > 200
        for counts, output in ((first, []), (second, [self.DRAFT[0]])):
            policy = self.policy(output, **options)
            assert not counts[policy == 0].any(), "what top-p and top-k leave out is never drawn"
            assert p_value(counts, policy) > 1e-4

    @pytest.mark.parametrize("name", ["cold", "top-p", "top-k"])
    @pytest.mark.parametrize("right", [True, False], ids=["ours", "stand-in"])
    def test_vllms_own_sampler_needs_another_expand_on_a_cpu(
        self, name: str, monkeypatch: pytest.MonkeyPatch, *, right: bool
    ) -> None:
        """With vLLM's own stand-in drafted rows get whatever lay in memory for temperature, top-k and top-p."""
        monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", verification.expand if right else stand_in)
        options = self.SETTINGS[name]
        metadata = sampling([[1, 2]] * self.ROWS, [[]] * self.ROWS, [[0]] * self.ROWS, **options)
        rows, ends = model([1, 2]).repeat(self.ROWS, 1), torch.arange(1, self.ROWS + 1, dtype=torch.int32)
        torch.manual_seed(1)
        shaped = rejection_sampler.apply_sampling_constraints(rows, ends, metadata)
        counts = torch.bincount(shaped.softmax(-1).multinomial(1).flatten(), minlength=VOCAB)
        p = p_value(counts, self.policy([], **options))
        assert p > 1e-4 if right else p < 1e-9


def stand_in(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: float = 0, replace_to: float = 0) -> Any:
    """`expand_batch_to_tokens` as it runs on a CPU without Triton, in memory that an earlier tensor left."""
    out = torch.full((num_tokens,), 3, dtype=x.dtype)
    cpu_triton_utils._expand_kernel_impl(out, x, cu_num_tokens, replace_from, replace_to)
    return out


def test_expand_repeats_each_value() -> None:
    x, ends = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    assert verification.expand(x, ends, 5, 0, 1).tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    assert verification.expand(torch.tensor([0.0, 3.0]), torch.tensor([1, 2]), 2, 0, 1).tolist() == [1.0, 3.0]
    assert math.isclose(float(verification.expand(x, ends, 5)[0]), 0.5)
