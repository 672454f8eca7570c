"""What each call of a response asks for, and when the response ends."""

import pytest

from seer_async.events import Restored
from seer_async.options import GroupOptions
from seer_async.sampling import chunk_seed

from .hand import PROMPT, Hand
from .tokens import byte_level_tokenizer

TENS = {"rollout": {"chunk_size": 10}}


def test_calls_ask_for_a_chunk_or_what_is_left() -> None:
    hand = Hand(**TENS).up().groups("g", limit=25)
    asked = []
    while hand.sent:
        asked.append(hand.sent[0].max_tokens)
        hand.answer("g/0")
    assert asked == [10, 10, 5]
    sample = hand.samples["g/0"]
    assert (sample.finish_reason, sample.stop_reason) == ("length", "")
    assert sample.token_ids == list(range(1000, 1025))
    assert [(chunk.n, chunk.tokens, chunk.attempt) for chunk in sample.chunks] == [(0, 10, 1), (1, 10, 1), (2, 5, 1)]


def test_an_indivisible_response_is_one_call() -> None:
    """What is cut short is thrown away: the state behind its options is lost with it."""
    options = GroupOptions(chunk_size=10, indivisible=True)
    hand = Hand(**TENS).up().groups("g", limit=25, options=options)
    assert hand.sent[0].max_tokens == 25
    hand.answer("g/0", 4, "abort")
    (call,) = hand.sent
    assert (call.prefix, call.max_tokens) == (PROMPT, 25)
    hand.answer("g/0")
    assert len(hand.samples["g/0"].chunks) == 1


def test_a_call_continues_prompt_and_tokens() -> None:
    hand = Hand(**TENS).up().groups("g")
    hand.answer("g/0", 4, "abort")
    call = hand.sent[0]
    assert call.prefix == [*PROMPT, 1000, 1001, 1002, 1003]
    assert call.params["extra_args"] == {"seer_prompt_len": 3}


def test_min_tokens_counts_over_chunks() -> None:
    hand = Hand(sampling={"min_tokens": 13}, **TENS).up().groups("g")
    asked = []
    for _ in range(3):
        asked.append(hand.sent[0].params.get("min_tokens"))
        hand.answer("g/0", 9, "abort")
    assert asked == [10, 4, None]  # never more than the chunk may hold


def test_seeds_differ_between_samples_and_stay_the_same_in_any_run() -> None:
    seeds = []
    for _ in range(2):
        hand = Hand(**TENS).up().groups("g", "h", n=2)
        seeds.append([call.params["seed"] for call in hand.sent])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4


def test_an_engine_that_draws_noise_by_call_gets_another_seed_for_each_chunk() -> None:
    hand = Hand(**TENS).up().groups("g")
    seed = hand.sent[0].params["seed"]
    hand.answer("g/0")
    assert hand.sent[0].params["seed"] == chunk_seed(seed, 10, position_seeds=False) != seed


@pytest.mark.parametrize(("stop_reason", "said"), [(None, ""), (42, "42")])
def test_the_models_end_and_stop_tokens_end_a_response(stop_reason: int | None, said: str) -> None:
    hand = Hand(**TENS).up().groups("g").close()
    hand.answer("g/0", 3, "stop", stop_reason=stop_reason)
    assert hand.samples["g/0"].finish_reason == "stop"
    assert hand.samples["g/0"].stop_reason == said
    assert hand.stopped == "done"


@pytest.mark.parametrize(("finish", "stop_reason"), [("length", None), ("abort", None), ("stop", "a string")])
def test_nothing_else_that_an_engine_says_ends_it(finish: str, stop_reason: str | None) -> None:
    hand = Hand(**TENS).up().groups("g")
    hand.answer("g/0", 7, finish, stop_reason=stop_reason)
    assert hand.running == ["g/0"]


def test_a_forced_length_ends_it_whatever_the_model_says() -> None:
    hand = Hand(**TENS).up().groups("g", n=2, limit=20, forced_lengths=(13, 50))
    assert all(call.params["ignore_eos"] for call in hand.sent)
    hand.answer("g/0")
    assert [call.max_tokens for call in hand.sent if call.request == "g/0"] == [3]
    hand.answer("g/0")
    hand.answer("g/1")
    hand.answer("g/1")
    assert [(s.finish_reason, s.stop_reason) for s in hand.samples.values()] == [("stop", "forced"), ("length", "")]


def test_the_room_reserved_says_nothing_of_a_forced_length() -> None:
    rooms = []
    for forced in (None, (1,)):
        hand = Hand(**TENS).up().groups("g", forced_lengths=forced)
        rooms.append(hand.core.instances["a"].reserved)
    assert rooms == [2, 2]


# Stop strings, decided on the joined text


def spell(text: str) -> list[int]:
    """One token for each byte."""
    tokenizer = byte_level_tokenizer()
    letters = [char for char, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    ids = [tokenizer.token_to_id(letter) for letter in "".join(letters)]
    assert None not in ids
    return ids


def stopping(stop: list[str], **sampling: object) -> Hand:
    tokenizer = byte_level_tokenizer()
    return Hand(tokenizer=tokenizer, sampling={"stop": stop, **sampling}, **TENS).groups("g", prompt=spell("ba "))


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_stop_string_over_a_chunk_border_is_found(cut: int) -> None:
    tokens = spell("ab€ba")  # 7 tokens: the stop string is complete with the sixth
    hand = stopping(["b€b"]).up()
    hand.answer("g/0", token_ids=tokens[:cut], finish="abort")
    if cut < 6:
        hand.answer("g/0", token_ids=tokens[cut:])
    sample = hand.samples["g/0"]
    assert (sample.finish_reason, sample.stop_reason, sample.text) == ("stop", "b€b", "a")
    assert sample.token_ids == tokens[:6]
    assert len(sample.logprobs) == 6
    assert sum(chunk.tokens for chunk in sample.chunks) == 6


def test_the_stop_string_is_shown_when_asked_for() -> None:
    hand = stopping(["b€"], include_stop_str_in_output=True).up()
    hand.answer("g/0", token_ids=spell("ab€ba"))
    assert hand.samples["g/0"].text == "ab€"


def test_the_first_stop_string_to_be_complete_counts() -> None:
    hand = stopping(["bab", "a "]).up()
    hand.answer("g/0", token_ids=spell("ba bab"))
    assert hand.samples["g/0"].stop_reason == "a "


def test_a_stop_string_before_min_tokens_is_none() -> None:
    hand = stopping(["b"], min_tokens=3).up()
    hand.answer("g/0", token_ids=spell("abab"))
    assert hand.samples["g/0"].text == "aba"
    assert len(hand.samples["g/0"].token_ids) == 4


def test_a_resumed_response_still_knows_the_text_before() -> None:
    first = stopping(["b€b"]).up()
    first.answer("g/0", token_ids=spell("ab€")[:4], finish="abort")  # in the middle of the character
    hand = stopping(["b€b"])
    for record in first.records:
        hand.post(Restored(record=record))
    hand.up().answer("g/0", token_ids=spell("ab€ba")[4:])
    assert hand.samples["g/0"].text == "a"


def test_the_ending_token_has_no_text() -> None:
    hand = stopping([]).up()
    hand.answer("g/0", token_ids=[*spell("ab"), 0], finish="stop")
    assert hand.samples["g/0"].text == "ab"
    assert hand.samples["g/0"].token_ids[-1] == 0


def test_a_prompt_that_ends_inside_a_character_stays_out_of_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    hand = Hand(tokenizer=tokenizer, **TENS).up().groups("g", prompt=[*spell("ab"), *spell("€")[:2]])
    hand.answer("g/0", token_ids=[*spell("ba"), 0], finish="stop")
    assert "ba" in hand.samples["g/0"].text
    assert "ab" not in hand.samples["g/0"].text
