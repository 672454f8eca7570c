"""The mock's tokenizer: token 3 + b is the byte b, and the ids above the bytes are made-up words.

Text is always encoded to bytes; the words exist so that every id the model samples decodes to something readable. Ids 0
to 2 are special. The tokenizer.json an orchestrator downloads is this very tokenizer, so both sides always agree.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seer_servers.mock.model import FIRST_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seer_servers.mock.wire import ChatMessage

SPECIAL = ("<unk>", "<s>", "</s>")
MIN_VOCAB_SIZE = FIRST_TOKEN + 256

_SPACE = "\u0120"  # how a byte-level vocabulary writes a space


@cache
def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """The tokenizer for ids in [0, vocab_size); `vocab_size` is at least `MIN_VOCAB_SIZE`."""
    words = (f"{_SPACE}w{n}" for n in range(MIN_VOCAB_SIZE, vocab_size))
    vocab = {token: n for n, token in enumerate([*SPECIAL, *_byte_alphabet(), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def render_chat(messages: Iterable[ChatMessage], *, add_generation_prompt: bool) -> str:
    """The mock's chat template: one `role: content` line per message."""
    lines = "".join(f"{message.role}: {message.content}\n" for message in messages)
    return lines + "assistant: " if add_generation_prompt else lines


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it is printable Latin-1."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
