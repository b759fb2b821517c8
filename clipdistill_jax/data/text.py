"""Captions to token ids, and to which word of the caption each token belongs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

_CHUNK = 8192  # texts encoded at once; the library's record of a text is large


class Tokens(NamedTuple):
    """Encoded texts, N of them, T tokens each. BERT's [CLS] and [SEP] stand for BOS and EOT.

    Attributes:
      tokens: int32 [N, T]; BOS, the text, EOT, then 0.
      token_mask: bool [N, T]; True on BOS, text and EOT.
      word_ids: int32 [N, T]; index into the text's words (`words.split_words`), -1 on BOS, EOT and padding.
    """

    tokens: np.ndarray
    token_mask: np.ndarray
    word_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that keeps word ids: CLIP's, or BERT's (`data.wordpiece.WordPiece`).

    Attributes:
      backend: the `tokenizers` tokenizer; its padding, truncation and special tokens are not used.
      bos_id: id put before a text.
      eot_id: id put after it.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    eot_id: int

    @property
    def vocab_size(self) -> int:
        """Rows that a token embedding needs."""
        return self.backend.get_vocab_size()

    def encode(self, texts: Sequence[str], max_tokens: int) -> Tokens:
        """Encodes texts; of a longer one the first max_tokens - 2 tokens stay, between BOS and EOT.

        Raises:
          ValueError: max_tokens leaves no room for a token, or texts is a single string.
        """
        if isinstance(texts, str):
            raise ValueError("encode takes a list of texts, not one string")
        if max_tokens < 3:
            raise ValueError(f"max_tokens={max_tokens}: needs at least 3, for BOS, one token and EOT")
        tokens = np.zeros((len(texts), max_tokens), np.int32)
        word_ids = np.full((len(texts), max_tokens), -1, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            for row, encoding in enumerate(self._encode(chunk), start):
                ids = encoding.ids[: max_tokens - 2]
                tokens[row, 1 : 1 + len(ids)] = ids
                word_ids[row, 1 : 1 + len(ids)] = encoding.word_ids[: len(ids)]
                lengths[row] = len(ids)
        tokens[:, 0] = self.bos_id
        tokens[np.arange(len(texts)), lengths + 1] = self.eot_id
        token_mask = np.arange(max_tokens) < (lengths + 2)[:, None]
        return Tokens(tokens, token_mask, word_ids)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """The ids of each word by itself; `encode` gives a text those of its words, one after the other.

        Args:
          words: as `split_words` gives them, with their case; a string of several gives all their ids.
        """
        found = []
        for start in range(0, len(words), _CHUNK):
            found += [encoding.ids for encoding in self._encode(list(words[start : start + _CHUNK]))]
        return found

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Ids and word ids of each text, without special tokens."""
        return self.backend.encode_batch(texts, add_special_tokens=False)
