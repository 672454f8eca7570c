"""Logprobs in the forms that vLLM's endpoints give them.

Each lists the sampled token first and then the most likely others, but they count differently: of k asked for,
/v1/completions gives the sampled token and the k most likely, the other two k in all, the sampled one included
(/inference/v1/generate gives at least that one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_async.types import TopLogprob

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tokenizers import Tokenizer

    from seer_async.types import Sample


class Scored(msgspec.Struct, frozen=True):
    """One candidate; `rank` is None where it is not known."""

    token_id: int
    logprob: float
    rank: int | None = None


class Position(msgspec.Struct, frozen=True, omit_defaults=True):
    """The sampled token at one position, and the candidates.

    `token` names it "token_id:N", as vLLM did on this route before it said `token_id`; clients of both times are about.
    """

    token_id: int
    logprob: float
    rank: int | None
    top_logprobs: list[Scored]
    token: str = ""


class Positions(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[Position]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The form of /v1/completions: parallel lists."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class Tokens(msgspec.Struct, frozen=True):
    """A stretch of sampled tokens with their logprobs, and the most likely tokens at each position if asked for."""

    ids: list[int]
    logprobs: list[float]
    tops: list[list[TopLogprob]] | None = None

    def __add__(self, more: Tokens) -> Tokens:
        """These and the following ones."""
        tops = None if self.tops is None and more.tops is None else (self.tops or []) + (more.tops or [])
        return Tokens(self.ids + more.ids, self.logprobs + more.logprobs, tops)

    def candidates(self) -> Iterator[list[TopLogprob]]:
        """At each position the sampled token and then the others."""
        tops: Iterable[list[TopLogprob]] = self.tops or ([] for _ in self.ids)
        for token_id, logprob, top in zip(self.ids, self.logprobs, tops, strict=True):
            yield [TopLogprob(token_id, logprob), *(other for other in top if other.token_id != token_id)]


def tokens_of(sample: Sample) -> Tokens:
    """All tokens of a response."""
    return Tokens(sample.token_ids, sample.logprobs, sample.top_logprobs)


def positions(tokens: Tokens, count: int, *, named: bool = False) -> Positions:
    """By token id, at most `count` candidates at each position; `named`: the sampled one also as `token`."""
    tops: Iterable[list[TopLogprob]] = tokens.tops or ([] for _ in tokens.ids)
    content = []
    for candidates, top in zip(tokens.candidates(), tops, strict=True):
        ranks = {other.token_id: rank for rank, other in enumerate(top, 1)}
        first, *_ = scored = [Scored(c.token_id, c.logprob, ranks.get(c.token_id)) for c in candidates]
        name = _name(first.token_id) if named else ""
        content.append(Position(first.token_id, first.logprob, first.rank, scored[:count], name))
    return Positions(content)


def others(tokens: Tokens) -> Positions:
    """By token id, the candidates other than the sampled token: what is missing of the completions' form."""
    return Positions(
        [
            Position(first.token_id, first.logprob, None, [Scored(c.token_id, c.logprob) for c in rest])
            for first, *rest in tokens.candidates()
        ]
    )


def by_id(tokens: Tokens, offset: int = 0) -> CompletionLogprobs:
    """The completions' form, with token ids for tokens. The first token is at `offset` of the text."""
    names = [_name(token_id) for token_id in tokens.ids]
    tops = [{_name(c.token_id): c.logprob for c in candidates} for candidates in tokens.candidates()]
    return CompletionLogprobs(_offsets(names, offset), tokens.logprobs, names, tops)


def by_text(
    tokens: Tokens, names: Sequence[str], tops: Sequence[dict[str, float] | None], offset: int = 0
) -> CompletionLogprobs:
    """The completions' form, with `names` for the sampled tokens and `tops` for the others."""
    pairs = zip(names, tokens.logprobs, tops, strict=True)
    with_sampled = [{name: logprob} | (top or {}) for name, logprob, top in pairs]
    return CompletionLogprobs(_offsets(names, offset), tokens.logprobs, list(names), with_sampled)


def chat_by_id(tokens: Tokens, count: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat's form, with token ids for tokens."""
    content = []
    for candidates in tokens.candidates():
        scored = [
            {"token": (name := _name(c.token_id)), "logprob": c.logprob, "bytes": list(name.encode())}
            for c in candidates[:count]
        ]
        first = candidates[0]
        said = tokenizer.decode([first.token_id], skip_special_tokens=False)
        content.append(
            {
                "token": _name(first.token_id),
                "logprob": first.logprob,
                "bytes": list(said.encode()),
                "top_logprobs": scored,
            }
        )
    return {"content": content}


def _name(token_id: int) -> str:
    return f"token_id:{token_id}"


def _offsets(names: Sequence[str], offset: int) -> list[int]:
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return offsets
