"""The mock's language model is pure, and its lengths are what the design page says."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_servers.mock import LanguageModel, reference_response
from seer_servers.mock.model import EOS, Sampling
from seer_servers.mock.tokenizer import byte_tokenizer
from tests.mock_http import PROMPT

TOKENS = st.lists(st.integers(0, 31_999), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    prompt=TOKENS,
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 120),
    cuts=st.lists(st.integers(1, 40), min_size=1),
    min_tokens=st.integers(0, 60),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sets(st.integers(3, 40), max_size=20),
)
def test_any_chunking_gives_the_undivided_response(
    prompt, seed, max_tokens, cuts, min_tokens, ignore_eos, stop_token_ids
):
    model = LanguageModel(mean_length=30, vocab_size=259)
    min_tokens = min(min_tokens, max_tokens)
    whole = reference_response(
        prompt := [token % 259 for token in prompt],
        seed,
        max_tokens,
        model=model,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    tokens, logprobs, finish_reason = [], [], "length"
    while finish_reason == "length" and len(tokens) < max_tokens:
        cut = min(cuts[len(tokens) % len(cuts)], max_tokens - len(tokens))
        sampling = Sampling(
            seed=seed,
            max_tokens=cut,
            min_tokens=max(0, min(min_tokens - len(tokens), cut)),
            ignore_eos=ignore_eos,
            stop_token_ids=frozenset(stop_token_ids),
        )
        chunk = model.respond(prompt + tokens, len(prompt), sampling)
        tokens, logprobs, finish_reason = tokens + chunk.token_ids, logprobs + chunk.logprobs, chunk.finish_reason
    assert (tokens, logprobs, finish_reason) == whole
    assert len(tokens) >= min_tokens
    assert all(0 <= token < 259 for token in tokens)
    assert all(-3 < logprob < 0 for logprob in logprobs)


@settings(deadline=None)
@given(prompt=TOKENS, at=st.integers(0, 39), seed=st.integers(0, 2**63 - 1))
def test_every_token_of_the_prefix_and_the_seed_matter(prompt, at, seed):
    other = list(prompt)
    other[at % len(prompt)] ^= 1
    here = reference_response(prompt, seed, 16, ignore_eos=True)
    assert here != reference_response(other, seed, 16, ignore_eos=True)
    assert here != reference_response(prompt, seed ^ 1, 16, ignore_eos=True)
    assert here != reference_response(prompt, seed, 16, ignore_eos=True, model=LanguageModel(version="next"))
    assert here != reference_response(prompt, seed, 16, ignore_eos=True, model=LanguageModel(seed=1))


def test_a_logprob_does_not_depend_on_the_seed():
    model = LanguageModel(vocab_size=259)
    by_token = {}
    for seed in range(2000):
        tokens, logprobs, _ = reference_response(PROMPT, seed, 1, model=model)
        by_token.setdefault(tokens[0], set()).add(logprobs[0])
    assert len(by_token) > 200
    assert all(len(logprobs) == 1 for logprobs in by_token.values())


def test_lengths_are_heavy_tailed_and_alike_within_a_group():
    model = LanguageModel(mean_length=200)
    groups = [
        [len(reference_response([n] * 20, seed, 100_000, model=model)[0]) for seed in range(8)] for n in range(3, 303)
    ]
    lengths = [length for group in groups for length in group]
    assert 140 < statistics.mean(lengths) < 280
    assert statistics.median(lengths) < 0.6 * statistics.mean(lengths)
    assert (
        statistics.correlation([group[0] for group in groups], [statistics.mean(group[1:]) for group in groups]) > 0.3
    )


def test_the_expected_length_depends_on_the_first_sixteen_prompt_tokens():
    model = LanguageModel()
    anchor = list(range(100, 116))
    assert model.expected_length(anchor) == model.expected_length([*anchor, 5, 6])
    assert len({model.expected_length([n, *anchor]) for n in range(50)}) == 50
    flat = LanguageModel(sigma=0)
    assert flat.expected_length([9]) == pytest.approx(400, rel=1e-3)


def test_a_response_ends_with_eos_or_a_stop_token_and_keeps_it():
    tokens, _, finish_reason = reference_response(PROMPT, 1, 10_000)
    assert (tokens[-1], finish_reason) == (EOS, "stop")
    longer, _, _ = reference_response(PROMPT, 1, len(tokens) + 5, ignore_eos=True)
    assert longer[: len(tokens) - 1] == tokens[:-1]
    assert EOS not in longer
    cut, _, finish_reason = reference_response(PROMPT, 1, 10_000, stop_token_ids={tokens[0]})
    assert (cut, finish_reason) == (tokens[:1], "stop")


@settings(deadline=None)
@given(st.text(max_size=60))
def test_a_token_is_a_byte(text):
    tokenizer = byte_tokenizer(300)
    plain = text.replace("<", "")  # no special tokens
    assert tokenizer.encode(plain).ids == [3 + byte for byte in plain.encode()]
    assert tokenizer.decode(tokenizer.encode(plain).ids) == plain
