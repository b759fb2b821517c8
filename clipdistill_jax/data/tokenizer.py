"""The tokenizer of a folder, of a hub id, or as a config names it."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import models

from clipdistill_jax.data import bpe, wordpiece
from clipdistill_jax.data.text import Tokenizer


def open_tokenizer(name: str, kind: str, texts: Callable[[], Iterable[str]], folder: Path) -> Tokenizer:
    """A Hugging Face directory's or hub id's; "train:N" is trained once, in `folder`.

    Args:
      name: as in the config.
      kind: "clip" or "bert": what is trained.
      texts: of the training split.
    """
    if not name.startswith("train:"):
        return load_tokenizer(name)
    if not (folder / "tokenizer.json").exists():
        train = wordpiece.train_wordpiece if kind == "bert" else bpe.train_clip_bpe
        train(texts(), int(name.removeprefix("train:")), folder)
    return load_tokenizer(folder)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a Hugging Face directory of CLIP or BERT, or a hub id such as "openai/clip-vit-base-patch32".

    Reads tokenizer.json, else vocab.json with merges.txt (CLIP), else vocab.txt (BERT).

    Raises:
      FileNotFoundError: none of them is there.
      ValueError: the files are no tokenizer, or neither CLIP's nor BERT's.
    """
    folder = _folder(path)
    try:
        backend = _read_backend(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{folder}: the tokenizer files cannot be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # a caption that says "<|endoftext|>" does not end there
    is_bert = isinstance(backend.model, models.WordPiece)
    ends = (wordpiece.CLS, wordpiece.SEP) if is_bert else (bpe.BOS, bpe.EOT)
    bos_id, eot_id = (backend.token_to_id(token) for token in ends)
    if bos_id is None or eot_id is None:
        raise ValueError(
            f"{folder}: neither a CLIP tokenizer (it has no {bpe.BOS} or no {bpe.EOT}) nor BERT's (it has no "
            f"{wordpiece.CLS} or no {wordpiece.SEP})"
        )
    if is_bert:
        return wordpiece.WordPiece(backend, bos_id, eot_id)
    bpe.check_words(backend, folder)
    return Tokenizer(backend, bos_id, eot_id)


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return bpe.read_backend(folder)
    if (folder / "vocab.txt").is_file():
        return wordpiece.read_backend(folder)
    raise FileNotFoundError(
        f"{folder}: no tokenizer here; needs tokenizer.json, or vocab.json and merges.txt, or vocab.txt"
    )


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
