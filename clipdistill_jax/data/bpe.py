"""CLIP's byte-level BPE."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from clipdistill_jax.data.words import clip_normalizer, clip_splitter, split_words

BOS = "<|startoftext|>"
EOT = "<|endoftext|>"
CONTEXT = 77  # CLIP's positions


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of vocab.json and merges.txt.

    Raises:
      ValueError: a line of merges.txt has not two parts, or the vocabulary has no BOS or no EOT.
    """
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = []
    for line, text in enumerate((folder / "merges.txt").read_text(encoding="utf-8").split("\n"), start=1):
        if text.startswith("#version") or not text.strip():
            continue
        pair = text.split()
        if len(pair) != 2:
            raise ValueError(f"merges.txt, line {line}: expected two parts, found {text[:40]!r}")
        merges.append((pair[0], pair[1]))
    return _backend(vocab, merges)


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The tokenizer that transformers' CLIPTokenizerFast builds from vocab.json and merges.txt."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=EOT)
    )
    backend.normalizer = clip_normalizer()
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


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [clip_splitter(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def check_words(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Word ids are comparable between tokenizers only if this one cuts words as `split_words` does.

    Raises:
      ValueError: it does not; the message names `folder`, where it is from.
    """
    probe = "Zwei 2nd-hand CAFÉS, don't...\u3000stop!"
    (words,) = split_words([probe])
    found = backend.encode(probe, add_special_tokens=False)
    apart = [backend.encode(word, add_special_tokens=False).ids for word in words]
    expected = [(k, token) for k, ids in enumerate(apart) for token in ids]
    if list(zip(found.word_ids, found.ids, strict=True)) != expected:
        raise ValueError(f"{folder}: not a CLIP tokenizer: it divides {probe!r} otherwise than into {words}")


def train_clip_bpe(
    captions: Iterable[str], vocab_size: int, out_dir: str | os.PathLike[str], *, max_length: int = CONTEXT
) -> None:
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
    learner.normalizer = clip_normalizer()
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
    _backend(vocab, merges).save(str(folder / "tokenizer.json"))


def _byte_letters() -> Iterable[str]:
    """The printable stand-ins of the 256 bytes in CLIP's order: those printable as they are come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*(chr(byte) for byte in plain), *(chr(256 + k) for k in range(len(rest)))]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
