"""The drafter between its parts: when it takes in tokens, and what it tells the budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the drafter is vLLM's to call")

import numpy as np

from seer_servers.drafting.client import Increment
from seer_servers.plugin.drafter import TAKE_IN_EVERY, GroupedDrafter
from seer_servers.plugin.kinship import kinship_of

PROMPT = [1, 2, 3, 4]
TEXT = [5, 6, 7, 8, 9] * 8  # says what comes next


class Engine:
    """One request that decodes, without a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prompt: list[int] | None = PROMPT, **extra: Any) -> None:
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=128, get_vocab_size=lambda: 32),
            speculative_config=SimpleNamespace(num_speculative_tokens=4),
        )
        self.drafter = GroupedDrafter(config)
        self.drafting = True
        self.learned: list[tuple[int, int, float, float]] = []
        monkeypatch.setattr(self.drafter.budget, "wants_drafts", lambda _: self.drafting)
        monkeypatch.setattr(self.drafter.budget, "allot", lambda survival, _: [len(path) for path in survival])
        monkeypatch.setattr(self.drafter.budget, "learn", lambda *told: self.learned.append(told))
        params = SimpleNamespace(
            extra_args={"seer_group": "g", "seer_request": "r"} | extra,
            max_tokens=100,
            min_tokens=0,
            ignore_eos=True,
            all_stop_token_ids=set(),
        )
        state = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt)
        self.runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]), requests={"a": state})
        self.text = list(PROMPT)

    def step(self, sampled: list[int], drafted: list[int]) -> list[int]:
        """Let a step verify `drafted` and sample `sampled`; returns the next draft."""
        self.text += sampled
        scheduled: Any = SimpleNamespace(
            num_scheduled_tokens={"a": 1 + len(drafted)},
            scheduled_spec_decode_tokens={"a": drafted} if drafted else {},
        )
        self.drafter.prepare(self.runner, scheduled)
        tokens = np.zeros((1, 128), dtype=np.int32)
        tokens[0, : len(self.text)] = self.text
        (draft,) = self.drafter.propose([sampled], np.array([len(self.text)], dtype=np.int32), tokens)
        return draft

    @property
    def known(self) -> int:
        """Tokens of the response that siblings may draft from."""
        return self.drafter.groups.length("g", "r")


def test_while_nothing_is_drafted_tokens_are_taken_in_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    engine.drafting = False
    seen = [engine.known for token in TEXT[: 2 * TAKE_IN_EVERY] if engine.step([token], []) == []]
    assert seen == [1] * TAKE_IN_EVERY + [1 + TAKE_IN_EVERY] * TAKE_IN_EVERY
    engine.drafting = True
    engine.step([TEXT[2 * TAKE_IN_EVERY]], [])
    assert engine.known == 2 * TAKE_IN_EVERY + 1


def test_drafts_are_judged_by_what_could_be_expected_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By luck all or none of a draft is right; the budget hears the same of both."""
    brought = []
    for right in (True, False):
        engine, draft = Engine(monkeypatch), []
        for token in TEXT[:20]:
            draft = engine.step([token], [])
        assert draft == TEXT[20:24]
        engine.step(TEXT[20:25] if right else [30], draft)
        (requests, verified, expected, _) = engine.learned[-1]
        assert (requests, verified) == (1, 4)
        brought.append(expected)
    assert brought[0] == brought[1]
    assert 1 < brought[0] < 5


@pytest.mark.parametrize("mark", ["x", [1], "2", 2.5, None, {}, True, -1, 0, 10**30])
def test_what_is_no_length_is_no_mark(monkeypatch: pytest.MonkeyPatch, mark: Any) -> None:
    """It comes from a client; the step that first sees it is the whole engine's."""
    engine = Engine(monkeypatch, seer_prompt_len=mark)
    for token in TEXT[:20]:
        draft = engine.step([token], [])
    assert draft == TEXT[20:24]
    assert engine.known == 20


def test_a_prompt_of_embeddings_is_not_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps no tokens of it, and zeros where they would be."""
    engine = Engine(monkeypatch, prompt=None)
    assert [engine.step([token], []) for token in TEXT[:20]] == [[]] * 20
    assert engine.known == len(engine.drafter.groups) == 0


def nested(depth: int) -> list[Any]:
    return [] if not depth else [nested(depth - 1)]


@pytest.mark.parametrize("name", ["", "x" * 257, "\ud800", ["g"], {}, 7, True, nested(900), "a\nb"])
def test_what_is_no_name_counts_as_not_said(name: Any) -> None:
    said = {"seer_group": name, "seer_request": name, "seer_salt": nested(900), "seer_priority": ["high"]}
    assert kinship_of("id", PROMPT, said) == kinship_of("id", PROMPT, {})
    assert kinship_of("id", PROMPT, {"seer_salt": "s"}).group != kinship_of("id", PROMPT, {}).group


@pytest.mark.parametrize("tokens", [[-1, 5], [5, 32]])
def test_tokens_beyond_the_vocabulary_are_left(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """The model is run on drafts: a negative one would end the engine."""
    engine = Engine(monkeypatch)
    news = [
        Increment("g", "bad", 0, np.array(tokens, dtype=np.int32)),
        Increment("g", "good", 0, np.array([31, 0], dtype=np.int32)),
    ]
    nothing: Any = lambda *_: None  # noqa: E731 - a client that only brings news
    client = SimpleNamespace(register_group=nothing, update=nothing, fetched=lambda: news)
    monkeypatch.setattr(engine.drafter, "client", client)
    engine.step([5], [])
    assert engine.drafter.groups.length("g", "bad") == 0
    assert engine.drafter.groups.length("g", "good") == 2
