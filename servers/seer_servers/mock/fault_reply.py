"""Faults inside a reply: JSON that is well-formed, mostly, and not what the call asked for.

Each takes the honest reply, which it may change, and returns the reply to send, on either route.
The first docstring line of each is its description for users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

Body = dict[str, Any]


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What an edit may draw on: `older` is a reply to another request; `under` answers the call under other weights."""

    max_tokens: int
    vocab_size: int
    older: Body | None
    under: Callable[[str], Body]


def wrong_types(body: Body, _scene: Scene) -> Body:
    """Token ids as strings."""
    body["choices"][0]["token_ids"] = [str(token) for token in _token_ids(body)]
    return body


def nan_logprobs(body: Body, _scene: Scene) -> Body:
    """Every logprob is NaN, written as JSON does not allow."""
    for n in range(_length(body)):
        _set_logprob(body, n, float("nan"))
    return body


def positive_logprob(body: Body, _scene: Scene) -> Body:
    """The last logprob is above 0."""
    for n in _last(body):
        _set_logprob(body, n, 0.5)
    return body


def missing_logprobs(body: Body, _scene: Scene) -> Body:
    """No logprobs, although they were asked for."""
    body["choices"][0]["logprobs"] = None
    return body


def token_out_of_range(body: Body, scene: Scene) -> Body:
    """The last token id is just beyond the vocabulary."""
    for n in _last(body):
        _set_token(body, n, scene.vocab_size)
    return body


def negative_token(body: Body, _scene: Scene) -> Body:
    """The last token id is negative."""
    for n in _last(body):
        _set_token(body, n, -1)
    return body


def more_tokens(body: Body, scene: Scene) -> Body:
    """One token more than max_tokens, each with its logprob."""
    missing = scene.max_tokens + 1 - _length(body)
    for column in _columns(body):
        column.extend(column[-1:] * missing)
    return body


def fewer_tokens(body: Body, _scene: Scene) -> Body:
    """One token fewer than there are logprobs."""
    del _token_ids(body)[-1:]
    return body


def zero_tokens(body: Body, _scene: Scene) -> Body:
    """No tokens at all, and finish reason "length"."""
    for column in _columns(body):
        column.clear()
    body["choices"][0].update(finish_reason="length", stop_reason=None)
    return body


def wrong_finish_reason(body: Body, _scene: Scene) -> Body:
    """A finish reason that vLLM does not have."""
    body["choices"][0]["finish_reason"] = "finished"
    return body


def wrong_model(body: Body, _scene: Scene) -> Body:
    """The reply names another model."""
    body["model"] = "another-model"
    return body


def duplicate_reply(body: Body, scene: Scene) -> Body:
    """An earlier reply to another request, under this request's id; honest while there is none."""
    key = "id" if "id" in body else "request_id"
    return {**scene.older, key: body[key]} if scene.older else body


def foreign_reply(body: Body, scene: Scene) -> Body:
    """An earlier reply to another request, with that request's id; honest while there is none."""
    return scene.older or body


def stale_version(_body: Body, scene: Scene) -> Body:
    """Sampled by weight version "stale"; /inference/v1/generate says so, the tokens differ on both routes."""
    return scene.under("stale")


def _token_ids(body: Body) -> list[Any]:
    """The reply's token ids; an empty list where they were not asked for."""
    return body["choices"][0]["token_ids"] or []


def _length(body: Body) -> int:
    return len(_token_ids(body))


def _last(body: Body) -> range:
    """The index of the last token, if there is one."""
    return range(_length(body))[-1:]


def _columns(body: Body) -> Iterator[list[Any]]:
    """Every list of a reply that has one entry per token, on either route."""
    yield _token_ids(body)
    yield from (body["choices"][0]["logprobs"] or {}).values()


def _set_logprob(body: Body, n: int, value: float) -> None:
    logprobs = body["choices"][0]["logprobs"] or {}
    for entry in logprobs.get("content", ())[n : n + 1]:
        entry["logprob"] = entry["top_logprobs"][0]["logprob"] = value
    if "tokens" in logprobs:
        logprobs["token_logprobs"][n] = value
        logprobs["top_logprobs"][n] = {logprobs["tokens"][n]: value}


def _set_token(body: Body, n: int, token: int) -> None:
    logprobs = body["choices"][0]["logprobs"] or {}
    _token_ids(body)[n] = token
    for entry in logprobs.get("content", ())[n : n + 1]:
        entry["token_id"] = entry["top_logprobs"][0]["token_id"] = token
    if "tokens" in logprobs:
        logprobs["tokens"][n] = f"token_id:{token}"
        logprobs["top_logprobs"][n] = {f"token_id:{token}": logprobs["token_logprobs"][n]}


EDITS: tuple[Callable[[Body, Scene], Body], ...] = (
    wrong_types,
    nan_logprobs,
    positive_logprob,
    missing_logprobs,
    token_out_of_range,
    negative_token,
    more_tokens,
    fewer_tokens,
    zero_tokens,
    wrong_finish_reason,
    wrong_model,
    duplicate_reply,
    foreign_reply,
    stale_version,
)
