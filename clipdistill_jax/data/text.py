"""Captions to token ids, and to which word of the caption each token belongs."""

import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS = "<|startoftext|>"
EOT = "<|endoftext|>"
CONTEXT = 77  # CLIP's positions
_CHUNK = 8192  # texts encoded at once; the library's record of a text is large
# CLIP's words (openai/CLIP clip/simple_tokenizer.py:78): English clitics, runs of letters, single digits,
# runs of anything else that is no space. Here after NFC, white space collapsed and lower case.
_WORD = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class Tokens(NamedTuple):
    """Encoded texts, N of them, T tokens each. BERT's [CLS] and [SEP] stand for BOS and EOT.

    Attributes:
      tokens: int32 [N, T]; BOS, the text, EOT, then 0.
      token_mask: bool [N, T]; True on BOS, text and EOT.
      word_ids: int32 [N, T]; index into the text's words (`split_words`), -1 on BOS, EOT and padding.
    """

    tokens: np.ndarray
    token_mask: np.ndarray
    word_ids: np.ndarray


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)


def split_words(texts: Iterable[str], keep_case: bool = False) -> list[list[str]]:
    """The words of each text, lower-cased, as CLIP's tokenizer divides it.

    Encoding the words one by one gives exactly the ids that CLIP gives for the whole text, so they are a
    common ground for tokenizers that cut words differently.

    Args:
      texts: any.
      keep_case: give the same words as the text writes them (a few, as those of "İ", stay lower-cased).
    """
    normalizer, splitter = _normalizer(), _splitter()
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

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Loads a Hugging Face directory of CLIP or BERT, or a hub id such as "openai/clip-vit-base-patch32".

        Reads tokenizer.json, else vocab.json with merges.txt (CLIP), else vocab.txt (BERT).

        Raises:
          FileNotFoundError: none of them is there.
          ValueError: the files are no tokenizer, or neither CLIP's nor BERT's.
        """
        from clipdistill_jax.data import wordpiece  # which is built on this file

        folder = _folder(path)
        try:
            if (folder / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                backend = _clip_backend(*_read_bpe(folder / "vocab.json", folder / "merges.txt"))
            elif (folder / "vocab.txt").is_file():
                backend = wordpiece.read_backend(folder)
            else:
                raise FileNotFoundError(
                    f"{folder}: no tokenizer here; needs tokenizer.json, or vocab.json and merges.txt, "
                    "or vocab.txt"
                )
        except OSError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{folder}: the tokenizer files cannot be read: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # a caption that says "<|endoftext|>" does not end there
        kind: type[Tokenizer] = Tokenizer
        ends = (BOS, EOT)
        if isinstance(backend.model, models.WordPiece):
            kind, ends = wordpiece.WordPiece, (wordpiece.CLS, wordpiece.SEP)
        bos_id, eot_id = (backend.token_to_id(token) for token in ends)
        if bos_id is None or eot_id is None:
            raise ValueError(
                f"{folder}: neither a CLIP tokenizer (it has no {BOS} or no {EOT}) nor BERT's (it has no "
                f"{wordpiece.CLS} or no {wordpiece.SEP})"
            )
        if kind is Tokenizer:
            _check_words(backend, folder)
        return kind(backend, bos_id, eot_id)

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


def train_clip_bpe(
    captions: Iterable[str], vocab_size: int, out_dir: str | os.PathLike[str], *, max_length: int = CONTEXT
) -> Tokenizer:
    """Learns a small byte-level BPE of CLIP's kind and writes it as a Hugging Face directory.

    The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word (`</w>`), the merges, then
    <|startoftext|> and <|endoftext|>. Any text can be encoded. transformers' CLIPTokenizerFast loads it.

    Args:
      captions: the training texts.
      vocab_size: most entries, at least 514; fewer come out where the texts give no more merges.
      out_dir: folder to write.
      max_length: model_max_length written into tokenizer_config.json.

    Raises:
      ValueError: vocab_size is too small for the bytes.
    """
    letters = list(_byte_letters())
    base = letters + [letter + "</w>" for letter in letters]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size={vocab_size}: needs at least {len(base) + 2}, for single bytes")
    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = _normalizer()
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # enough merges in any case: they are cut below
        special_tokens=base,  # fixes their numbers, by which the trainer breaks ties
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - len(base) - 2]
    entries = [*base, *("".join(pair) for pair in merges), BOS, EOT]
    vocab = {entry: k for k, entry in enumerate(entries)}

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOT, "unk_token": EOT, "pad_token": EOT}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **special}
    _write_json(folder / "tokenizer_config.json", config)
    _clip_backend(vocab, merges).save(str(folder / "tokenizer.json"))
    return Tokenizer.from_dir(folder)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [_splitter(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The tokenizer that transformers' CLIPTokenizerFast builds from vocab.json and merges.txt."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=EOT)
    )
    backend.normalizer = _normalizer()
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for token in (BOS, EOT):
        if token not in vocab:
            raise ValueError(f"the vocabulary has no {token}")
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (BOS, EOT)])
    backend.post_processor = processors.RobertaProcessing(
        sep=(EOT, vocab[EOT]), cls=(BOS, vocab[BOS]), add_prefix_space=False, trim_offsets=False
    )
    return backend


def _check_words(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Word ids are comparable between tokenizers only if this one cuts words as `split_words` does."""
    probe = "Zwei 2nd-hand CAFÉS, don't...\u3000stop!"
    (words,) = split_words([probe])
    found = backend.encode(probe, add_special_tokens=False)
    apart = [backend.encode(word, add_special_tokens=False).ids for word in words]
    expected = [(k, token) for k, ids in enumerate(apart) for token in ids]
    if list(zip(found.word_ids, found.ids, strict=True)) != expected:
        raise ValueError(f"{folder}: not a CLIP tokenizer: it divides {probe!r} otherwise than into {words}")


def _read_bpe(vocab_path: Path, merges_path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    merges = []
    for line, text in enumerate(merges_path.read_text(encoding="utf-8").split("\n"), start=1):
        if text.startswith("#version") or not text.strip():
            continue
        pair = text.split()
        if len(pair) != 2:
            raise ValueError(f"{merges_path.name}, line {line}: expected two parts, found {text[:40]!r}")
        merges.append((pair[0], pair[1]))
    return vocab, merges


def _byte_letters() -> Iterable[str]:
    """The printable stand-ins of the 256 bytes in CLIP's order: those printable as they are come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*(chr(byte) for byte in plain), *(chr(256 + k) for k in range(len(rest)))]


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.exists():
        return folder
    name = os.fspath(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, nor a hub id such as openai/clip-vit-base-patch32")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name}: no such folder, and the hub does not give it: {error}") from error


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
