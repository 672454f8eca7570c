"""Text and stop strings, decided from token ids here rather than per chunk on an engine.

Invariant: a `TextStream` fed a response's tokens in any division gives the text, and finds the stop string, that one
undivided pass gives. It therefore survives chunk borders inside a multi-byte character or a stop string.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from seer_async.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seer_async.sampling import Sampling

_UNFINISHED = "\ufffd"
_PRIMING_TOKENS = 32  # enough prompt to settle a leading space; a whole prompt would cost O(prompt) per sample


class StopMatch(msgspec.Struct, frozen=True):
    """`stop` was completed by the `tokens`-th token of the response (counted from 1)."""

    stop: str
    tokens: int


class TextStream:
    """Incremental text of one response.

    `text` never includes an unfinished multi-byte character. After a stop match it ends before the stop string, or
    after it with `include_stop_str_in_output`.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._decoder = self._new_decoder(prompt_token_ids)
        self._previous_special = False
        self._special = (
            {} if sampling.skip_special_tokens or sampling.spaces_between_special_tokens else _added(tokenizer)
        )
        self.tokens = 0
        self.text = ""

    def _new_decoder(self, prompt_token_ids: Sequence[int]) -> DecodeStream:
        primer = list(prompt_token_ids[-_PRIMING_TOKENS:])
        if self._tokenizer.decode(primer).endswith(_UNFINISHED):
            primer = []  # a prompt that ends inside a character would come out again with the character's end
        return DecodeStream(ids=primer, skip_special_tokens=self._sampling.skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Append tokens; stop at, and cut the text to, the first stop string they complete."""
        pieces: list[str] = []
        for token_id in token_ids:
            piece = self._piece(token_id)
            self.tokens += 1
            if not self._sampling.stop:
                pieces.append(piece)
            elif match := self._extend(piece):
                return match
        self.text += "".join(pieces)
        return None

    def skip(self) -> None:
        """Count a token that has no text: the stop token that ended the response."""
        self.tokens += 1

    def _piece(self, token_id: int) -> str:
        try:
            piece = self._decoder.step(self._tokenizer, token_id) or ""
        except Exception as error:
            if not str(error).startswith("Invalid prefix"):
                raise
            # A byte sequence that can never become valid UTF-8 wedges the stream; start a new one behind it.
            self._decoder = self._new_decoder([])
            piece = self._decoder.step(self._tokenizer, token_id) or ""
        if self._special:
            special = self._special.get(token_id)
            if special is not None and self._previous_special:
                piece = special
            self._previous_special = special is not None
        return piece

    def _extend(self, piece: str) -> StopMatch | None:
        known = len(self.text)
        self.text += piece
        if not piece or self.tokens <= self._sampling.min_tokens:
            return None
        return self._find(known)

    def _find(self, known: int) -> StopMatch | None:
        """The stop string that ends first behind `known`; among those ending together, the first listed."""
        best: tuple[int, str] | None = None
        for stop in self._sampling.stop:
            at = self.text.find(stop, max(known - len(stop) + 1, 0))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = (at + len(stop), stop)
        if best is None:
            return None
        end, stop = best
        self.text = self.text[: end if self._sampling.include_stop_str_in_output else end - len(stop)]
        return StopMatch(stop, self.tokens)


def whole_text(
    tokenizer: Tokenizer,
    sampling: Sampling,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    *,
    ended_by_token: bool,
) -> str:
    """Text of a finished response without stop strings; the ending stop token itself is shown only when asked for."""
    stream = TextStream(tokenizer, sampling, prompt_token_ids)
    shown = len(token_ids) - (ended_by_token and not sampling.include_stop_str_in_output)
    stream.push(token_ids[:shown])
    return stream.text


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from a folder holding tokenizer.json, from such a file, or from a hub name in the local cache.

    Raises:
        UsageError: It cannot be found or read; says which option names it.
    """
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        return Tokenizer.from_pretrained(source)
    except Exception as error:
        raise UsageError(f"cannot load the tokenizer from {source!r} ({error}); name one with --tokenizer") from error


def _added(tokenizer: Tokenizer) -> dict[int, str]:
    return {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
