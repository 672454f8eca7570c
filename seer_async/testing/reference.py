"""What a sample must be: the response that one undivided call to an engine of its weight version gives."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from seer_async.sampling import chunk_seed
from seer_async.testing.model import Generated, Model
from seer_async.testing.work import alternatives
from seer_async.text import TextStream
from seer_async.types import TopLogprob

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from tokenizers import Tokenizer

    from seer_async.events import GroupAdded
    from seer_async.sampling import Sampling
    from seer_async.types import Sample


class Response(msgspec.Struct, frozen=True):
    """The checkable part of a sample."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[TopLogprob]] | None
    finish_reason: str
    stop_reason: str
    text: str | None


class Reference:
    """Knows every right answer. `position_seeds` says whether the engines draw noise by position."""

    def __init__(
        self, model: Model, sampling: Sampling, *, tokenizer: Tokenizer | None = None, position_seeds: bool = True
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._position_seeds = position_seeds

    def check(self, sample: Sample, group: GroupAdded, versions: Collection[str], *, may_mix: bool) -> None:
        """Raise AssertionError where a sample is not what the model says.

        `versions` are all weight versions there were. Where `may_mix`, a sample's tokens may be of several.
        """
        assert len(sample.token_ids) <= group.limit, f"{sample.id} is over its limit"
        assert sample.prompt_token_ids == group.prompt.token_ids, f"{sample.id} has another prompt"
        if may_mix:
            self._check_tokens(sample, versions, forced=group.forced_lengths is not None)
            return
        expected = self._response(sample, group)
        if sample.finish_reason not in {"stop", "length"}:
            count = len(sample.token_ids)
            assert sample.token_ids == expected.token_ids[:count], f"{sample.id} holds tokens that are not its own"
            assert sample.logprobs == expected.logprobs[:count], f"{sample.id} holds logprobs that are not its own"
            return
        actual = Response(
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            top_logprobs=sample.top_logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            text=sample.text,
        )
        assert actual == expected, f"{sample.id} is {actual}, but must be {expected}"

    def _check_tokens(self, sample: Sample, versions: Collection[str], *, forced: bool) -> None:
        """Each token is what some weights sample after the tokens before it."""
        have = sample.prompt_token_ids
        for n, pair in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            prefix = have + sample.token_ids[:n]
            calls = [self._generate(sample, prefix, v, self._begin(sample, n), 1, forced=forced) for v in versions]
            assert pair in {(call.token_ids[0], call.logprobs[0]) for call in calls}, f"{sample.id} has a foreign token"

    def _response(self, sample: Sample, group: GroupAdded) -> Response:
        forced = group.forced_lengths[sample.index] if group.forced_lengths else None
        limit = group.limit if forced is None else min(group.limit, forced)
        given = self._whole(sample, limit, forced=forced is not None)
        reason: int | str | None = given.stop_reason
        if forced is not None and len(given.token_ids) == forced and given.finish_reason == "length":
            given.finish_reason, reason = "stop", "forced"
        return self._worded(sample.prompt_token_ids, given, reason)

    def _whole(self, sample: Sample, limit: int, *, forced: bool) -> Generated:
        version = sample.weight_version
        if self._position_seeds:
            return self._generate(sample, sample.prompt_token_ids, version, 0, limit, forced=forced)
        whole = Generated([], [], "length", None)  # noise begins anew with each chunk: follow the sample's own cuts
        ends = [*accumulate(chunk.tokens for chunk in sample.chunks), limit]
        for end in ends:
            begin = len(whole.token_ids)
            if whole.finish_reason == "length" and begin < end:
                prefix = sample.prompt_token_ids + whole.token_ids
                part = self._generate(sample, prefix, version, begin, end - begin, forced=forced)
                whole.token_ids += part.token_ids
                whole.logprobs += part.logprobs
                whole.finish_reason, whole.stop_reason = part.finish_reason, part.stop_reason
        return whole

    def _begin(self, sample: Sample, token: int) -> int:
        """How many tokens come before the chunk that holds the `token`-th one, counted from 0."""
        ends = list(accumulate(chunk.tokens for chunk in sample.chunks))
        return max((end for end in ends if end <= token), default=0)

    def _generate(
        self, sample: Sample, prefix: Sequence[int], version: str, begin: int, most: int, *, forced: bool
    ) -> Generated:
        """At most `most` tokens behind `prefix`, in a chunk that begins after `begin` tokens of the response."""
        prompt_len = len(sample.prompt_token_ids)
        return self._model.generate(
            prefix,
            prompt_len=prompt_len,
            seed=chunk_seed(sample.seed, begin, position_seeds=self._position_seeds),
            version=version,
            max_tokens=most,
            min_tokens=self._sampling.min_tokens - (len(prefix) - prompt_len),
            ignore_eos=forced or self._sampling.ignore_eos,
            stop_token_ids=self._sampling.stop_token_ids,
        )

    def _worded(self, prompt: Sequence[int], given: Generated, reason: int | str | None) -> Response:
        """The response with its text, cut at the first stop string."""
        text, count = None, len(given.token_ids)
        if self._tokenizer is not None:
            by_token = given.finish_reason == "stop" and not isinstance(reason, str)
            hidden = by_token and not self._sampling.include_stop_str_in_output
            stream = TextStream(self._tokenizer, self._sampling, prompt)
            if match := stream.push(given.token_ids[: count - hidden]):
                count, given.finish_reason, reason = match.tokens, "stop", match.stop
            text = stream.text
        tokens, logprobs = given.token_ids[:count], given.logprobs[:count]
        return Response(
            token_ids=tokens,
            logprobs=logprobs,
            top_logprobs=alternatives(tokens, logprobs) or None if self._sampling.logprobs else None,
            finish_reason=given.finish_reason,
            stop_reason="" if reason is None else str(reason),
            text=text,
        )
