"""What CLIP calls a word."""

import unicodedata
from collections.abc import Iterable

import tokenizers
from tokenizers import normalizers, pre_tokenizers

# CLIP's words (openai/CLIP clip/simple_tokenizer.py:78): English clitics, runs of letters, single digits,
# runs of anything else that is no space. Here after NFC, white space collapsed and lower case.
_WORD = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def clip_normalizer() -> normalizers.Normalizer:
    """What CLIP does to a text before it divides it."""
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def clip_splitter() -> pre_tokenizers.PreTokenizer:
    """Divides a text so normalised into CLIP's words; the space between them goes."""
    return pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)


def split_words(texts: Iterable[str], keep_case: bool = False) -> list[list[str]]:
    """The words of each text, lower-cased, as CLIP's tokenizer divides it.

    Encoding the words one by one gives exactly the ids that CLIP gives for the whole text, so they are a
    common ground for tokenizers that cut words differently.

    Args:
      texts: any.
      keep_case: give the same words as the text writes them (a few, as those of "İ", stay lower-cased).
    """
    normalizer, splitter = clip_normalizer(), clip_splitter()
    if keep_case:
        return [_written(text, normalizer, splitter) for text in texts]
    return [[word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))] for text in texts]


def _written(
    text: str, normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer
) -> list[str]:
    pieces = tokenizers.PreTokenizedString(text)
    pieces.normalize(normalizer.normalize)
    splitter.pre_tokenize(pieces)
    words = []
    for word, (start, end), _ in pieces.get_splits("original", "char"):
        written = unicodedata.normalize("NFC", text[start:end])
        # Lower case can have more characters, of which each may be a word of its own.
        words.append(written if normalizer.normalize_str(written) == word else word)
    return words
