"""A small byte-level BPE tokenizer whose tokens split characters and stop strings in the middle."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXT = " abé€😀"  # of one, two, three and four bytes


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Id 0 is the end of sequence; then every byte of `TEXT`, some pairs of them, and one special token more."""
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted({letter for word, _ in encode.pre_tokenize_str(TEXT) for letter in word})
    bytes_of = {char: encode.pre_tokenize_str(char)[0][0] for char in TEXT}
    merges = [("a", "b"), (bytes_of[" "], "a"), tuple(bytes_of["é"]), tuple(bytes_of["€"][:2])]
    vocab = {"<eos>": 0}
    for token in [*letters, *(left + right for left, right in merges)]:
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = encode
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<tool>", special=True)])
    return tokenizer
