"""The outlook says what drafts from siblings would bring, in bounded memory."""

from __future__ import annotations

import random

import pytest

from seer_async.drafting import outlook
from seer_async.drafting.outlook import ENOUGH, GROUPS, LONGEST, REQUESTS, Outlook


def say(ears: Outlook, request: str, tokens: list[int], at_once: int = 1) -> None:
    for begin in range(0, len(tokens), at_once):
        ears.heard(request, tokens[begin : begin + at_once])


def noise(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=count)


def test_nothing_is_expected_before_enough_is_heard() -> None:
    ears = Outlook()
    ears.came("a", "g")
    say(ears, "a", [1, 2] * (ENOUGH // 2 - 1))
    assert ears.brings == 1
    say(ears, "a", [1, 2])
    assert ears.brings > 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_sibling_that_says_the_same_is_foretold(at_once: int) -> None:
    ears, text = Outlook(), noise(10_000, 1)
    ears.came("a", "g")
    say(ears, "a", text)
    ears.left("a")
    ears.came("b", "g")
    say(ears, "b", text, at_once)
    assert 0.9 * (1 + LONGEST) < ears.brings <= 1 + LONGEST


def test_other_groups_and_other_texts_bring_nothing() -> None:
    ears, text = Outlook(), noise(2_000, 2)
    for request, group, tokens in (("a", "g", text), ("b", "h", text), ("c", "g", noise(2_000, 3))):
        ears.came(request, group)
        say(ears, request, tokens)
    assert ears.brings == pytest.approx(1.0)


def test_it_hears_when_texts_change() -> None:
    ears, text = Outlook(), noise(1_000, 4)
    for request in ("a", "b"):
        ears.came(request, "g")
        say(ears, request, text)
    say(ears, "b", noise(2_000, 5))
    assert ears.brings == pytest.approx(1.0, abs=0.05)


def test_few_are_listened_to_and_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "MOST_PLACES", 100)
    ears = Outlook()
    for number in range(1_000):
        ears.came(str(number), f"g{number // 4}")
        say(ears, str(number), noise(10, number))
        if number % 3 == 0:
            ears.left(str(number))
    assert len(ears.requests) <= REQUESTS
    assert len(ears._texts) <= GROUPS
    assert all(len(text) <= 100 for text in ears._texts.values())
    ears.left("never seen")
    ears.heard("never seen", [1])
