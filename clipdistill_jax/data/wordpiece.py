"""BERT's WordPiece on the words that CLIP's tokenizer has too."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.words import split_words

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
CONTEXT = 512  # BERT's positions


@dataclasses.dataclass(frozen=True)
class WordPiece(Tokenizer):
    """A BERT tokenizer that encodes the words of `split_words` one by one and keeps word ids.

    Word i is the same word as with a CLIP tokenizer. The ids are those that BERT gives the whole text, except
    that a number goes digit by digit, and letters apart from the digits, the symbols (no punctuation) and
    what looks like a clitic beside them: those are words of their own ("2nd": 2, nd; "'dance": 'd, ance). A
    word of which BERT's normaliser leaves nothing (a control character, a lone accent) has no token.

    Attributes:
      bos_id, eot_id: of [CLS] and [SEP].
    """

    @property
    def cased(self) -> bool:
        """Whether the vocabulary tells upper from lower case."""
        normalizer = self.backend.normalizer
        return normalizer is None or normalizer.normalize_str("A") == "A"

    @property
    def plain_ids(self) -> range:
        """Ids of words and their pieces: from "!" on (UNITER prepro.py), else behind the special ones."""
        first = self.backend.token_to_id("!")
        if first is None:
            known = (self.backend.token_to_id(token) for token in SPECIAL)
            first = 1 + max(number for number in known if number is not None)
        return range(first, self.vocab_size)

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        words = split_words(texts, keep_case=self.cased)
        return self.backend.encode_batch(words, is_pretokenized=True, add_special_tokens=False)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of vocab.txt, with the settings of tokenizer_config.json where there is one.

    Where nothing says whether the vocabulary is cased, it is if it has an upper-case letter.

    Raises:
      ValueError: vocab.txt has an entry twice, or no [UNK].
    """
    entries = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocab = {entry: k for k, entry in enumerate(entries)}
    if len(vocab) < len(entries):
        twice = next(entry for k, entry in enumerate(entries) if vocab[entry] != k)
        raise ValueError(f"vocab.txt: the entry {twice!r} is there twice")
    if UNK not in vocab:
        raise ValueError(f"vocab.txt has no {UNK}")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    cased = any(entry != entry.lower() for entry in entries if not entry.startswith("["))
    return _backend(
        vocab,
        lowercase=settings.get("do_lower_case", not cased),
        strip_accents=settings.get("strip_accents"),
        chinese=settings.get("tokenize_chinese_chars", True),
    )


def _backend(
    vocab: dict[str, int], lowercase: bool = True, strip_accents: bool | None = None, chinese: bool = True
) -> tokenizers.Tokenizer:
    """The tokenizer that transformers' BertTokenizerFast builds from vocab.txt."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    known = [token for token in SPECIAL if token in vocab]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in known])
    if CLS in vocab and SEP in vocab:
        backend.post_processor = processors.BertProcessing((SEP, vocab[SEP]), (CLS, vocab[CLS]))
    return backend


def train_wordpiece(captions: Iterable[str], size: int, folder: str | os.PathLike[str]) -> None:
    """Learns a small uncased WordPiece vocabulary and writes it as a Hugging Face directory.

    It holds the special tokens, every character of the captions (alone and as the rest of a word), then the
    merges. transformers' BertTokenizerFast loads it.

    Args:
      captions: the training texts.
      size: most entries; fewer come out where the texts give no more merges.
      folder: to write.

    Raises:
      ValueError: `size` is too small for the characters.
    """
    parts = _backend({token: k for k, token in enumerate(SPECIAL)})
    lines = []
    for words in split_words(captions):
        normal = (parts.normalizer.normalize_str(word) for word in words)
        lines.append(" ".join(piece for x in normal for piece, _ in parts.pre_tokenizer.pre_tokenize_str(x)))
    letters = sorted(set().union(*lines) - {" "})
    base = [*SPECIAL, *letters, *("##" + letter for letter in letters)]
    if size < len(base):
        raise ValueError(f"size={size}: needs at least {len(base)}, for the captions' single characters")
    learner = tokenizers.Tokenizer(models.WordPiece({UNK: 0}, unk_token=UNK))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=base,  # fixes their numbers, by which the trainer breaks ties
        show_progress=False,
    )
    learner.train_from_iterator(lines, trainer)
    vocab = learner.get_vocab()

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n", encoding="utf-8")
    names = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": CONTEXT, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    _backend(vocab).save(str(out / "tokenizer.json"))
