"""Where a response ends, and its text.

Invariant: a response ends at its first stop string, wherever chunks were cut; at the model's end of sequence or a stop
token id; or at its length. A chunk's own "length" or "abort", or a stop string that only the engine saw, ends nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seer_async.text import TextStream, whole_text
from seer_async.types import ChunkReply

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from seer_async.request import Request

Ending = tuple[str, int | str | None]  # finish reason and stop reason


def ending(request: Request, reply: ChunkReply) -> Ending | None:
    """Why the response is over with this reply, its latest one; None while it goes on."""
    if _ended_by_token(reply):
        return "stop", reply.stop_reason
    if request.forced_length is not None and request.generated >= request.forced_length:
        return "stop", "forced"
    if request.generated >= request.group.limit:
        return "length", None
    return None


class Texts:
    """What responses say. Without a tokenizer they have no text, and no stop strings."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def cut(self, request: Request, reply: ChunkReply) -> tuple[ChunkReply, Ending | None]:
        """The reply up to the token that completes a stop string, if one does."""
        if not request.group.options.sampling.stop or self._tokenizer is None:
            return reply, None
        if request.text is None:
            request.text = self._replayed(self._tokenizer, request)
        if (match := request.text.push(_shown(request, reply))) is None:
            return reply, None
        kept = match.tokens - request.generated
        return _truncated(reply, kept), ("stop", match.stop)

    def whole(self, request: Request) -> str | None:
        """The text of a response that has ended."""
        if self._tokenizer is None:
            return None
        if request.text is not None:
            return request.text.text
        ended_by_token = request.finish_reason == "stop" and not isinstance(request.stop_reason, str)
        prompt, sampling = request.group.prompt.token_ids or [], request.group.options.sampling
        return whole_text(self._tokenizer, sampling, prompt, request.tokens, ended_by_token=ended_by_token)

    @staticmethod
    def _replayed(tokenizer: Tokenizer, request: Request) -> TextStream:
        group = request.group
        stream = TextStream(tokenizer, group.options.sampling, group.prompt.token_ids or [])
        stream.push(request.tokens)
        return stream


def _ended_by_token(reply: ChunkReply) -> bool:
    """Whether the model's end-of-sequence token or a stop token id ended the response."""
    return reply.finish_reason == "stop" and not isinstance(reply.stop_reason, str)


def _shown(request: Request, reply: ChunkReply) -> list[int]:
    hidden = _ended_by_token(reply) and not request.group.options.sampling.include_stop_str_in_output
    return reply.token_ids[:-1] if hidden else reply.token_ids


def _truncated(reply: ChunkReply, tokens: int) -> ChunkReply:
    return ChunkReply(
        token_ids=reply.token_ids[:tokens],
        logprobs=reply.logprobs[:tokens],
        top_logprobs=reply.top_logprobs[:tokens] if reply.top_logprobs is not None else None,
        finish_reason="stop",
        versions=reply.versions,
    )
