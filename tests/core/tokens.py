"""A small byte-level BPE tokenizer whose tokens split characters and stop strings in the middle."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXT = " abé€😀"  # characters of one, two, three and four bytes
_ENCODE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _letters(text: str) -> str:
    """Byte-level BPE writes each byte as a printable letter."""
    return _ENCODE.pre_tokenize_str(text)[0][0]


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Id 0 is the end of sequence; then every byte of `TEXT`, some merged ones, and one special token more."""
    merges = [("a", "b"), (_letters(" "), "a"), tuple(_letters("é")), tuple(_letters("€")[:2])]
    vocab = {"<eos>": 0}
    for token in [*sorted(set(_letters(TEXT))), *("".join(merge) for merge in merges)]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _ENCODE
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<tool>", special=True)])
    return tokenizer


@cache
def bytes_of() -> dict[int, bytes]:
    """What each token spells, but for the special ones."""
    letters = dict(zip(_letters(TEXT), TEXT.encode(), strict=True))
    vocab = byte_level_tokenizer().get_vocab()
    return {i: bytes(letters[c] for c in token) for token, i in vocab.items() if not token.startswith("<")}
