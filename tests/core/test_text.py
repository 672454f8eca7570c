"""Text and stop strings do not depend on how a response was cut, and are what the bytes of its tokens spell."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from seer_async.sampling import Sampling
from seer_async.text import StopMatch, TextStream, whole_text

from .tokens import TEXT, byte_level_tokenizer, bytes_of

TOKENIZER = byte_level_tokenizer()
PROMPT = TOKENIZER.encode("ab ").ids
VOCABULARY = range(TOKENIZER.get_vocab_size())

any_tokens = st.lists(st.sampled_from(VOCABULARY), max_size=40)
texts = st.text(TEXT, max_size=20)
stops = st.lists(st.text(TEXT, min_size=1, max_size=3), max_size=3)
cuts = st.lists(st.integers(0, 40), max_size=6)


@st.composite
def spellings(draw: st.DrawFn) -> list[int]:
    """Tokens of a whole text: of bytes, or of what byte pairs were merged into."""
    tokens = []
    for word in draw(st.lists(texts, max_size=6)):
        merged = draw(st.booleans())
        tokens += TOKENIZER.encode(word).ids if merged else [BYTES[byte] for byte in word.encode()]
    return tokens


BYTES = {spelt[0]: token for token, spelt in bytes_of().items() if len(spelt) == 1}


def run(tokens: list[int], at: list[int], sampling: Sampling) -> tuple[str, StopMatch | None]:
    """Push the tokens in pieces that end at these places."""
    stream = TextStream(TOKENIZER, sampling, PROMPT)
    borders = sorted({0, len(tokens), *(place for place in at if place < len(tokens))})
    for begin, end in pairwise(borders):
        if match := stream.push(tokens[begin:end]):
            return stream.text, match
    return stream.text, None


@settings(max_examples=300, deadline=None)
@given(any_tokens, cuts, stops, st.integers(0, 10), st.booleans(), st.booleans(), st.booleans())
def test_any_division_gives_what_one_pass_gives(
    tokens: list[int], at: list[int], stop: list[str], min_tokens: int, shown: bool, skip: bool, spaces: bool
) -> None:
    sampling = Sampling(
        stop=stop,
        min_tokens=min_tokens,
        include_stop_str_in_output=shown,
        skip_special_tokens=skip,
        spaces_between_special_tokens=spaces,
    )
    assert run(tokens, at, sampling) == run(tokens, [], sampling)


def complete(spelt: bytes) -> str:
    """The text so far: without the character that is not finished yet."""
    return spelt.decode(errors="ignore")


@settings(max_examples=300, deadline=None)
@given(spellings(), cuts, stops, st.integers(0, 10), st.booleans())
def test_the_stop_string_is_where_the_bytes_spell_it(
    tokens: list[int], at: list[int], stop: list[str], min_tokens: int, shown: bool
) -> None:
    spelt = [bytes_of()[token] for token in tokens]
    expected: tuple[str, StopMatch | None] = complete(b"".join(spelt)), None
    known = 0
    for count in range(1, len(tokens) + 1):
        text = complete(b"".join(spelt[:count]))
        ends = [(at + len(s), n, s) for n, s in enumerate(stop) for at in range(len(text)) if text.startswith(s, at)]
        ends = [found for found in ends if found[0] > known]
        known = len(text)
        if ends and count > min_tokens:
            end, _, first = min(ends)
            expected = text[: end if shown else end - len(first)], StopMatch(first, count)
            break
    sampling = Sampling(stop=stop, min_tokens=min_tokens, include_stop_str_in_output=shown)
    assert run(tokens, at, sampling) == expected


@settings(max_examples=300, deadline=None)
@given(any_tokens)
def test_bytes_that_are_no_text_lose_nothing_but_themselves(tokens: list[int]) -> None:
    """Every character that is whole is in the text, in order."""
    sampling = Sampling(skip_special_tokens=True)
    spelt = b"".join(bytes_of().get(token, b"") for token in tokens)
    text = whole_text(TOKENIZER, sampling, PROMPT, tokens, ended_by_token=False)
    assert text.replace("\ufffd", "") == complete(spelt)
