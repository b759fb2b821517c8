"""The tokenizer that a config names."""

from collections.abc import Callable, Iterable
from pathlib import Path

from clipdistill_jax.data.text import Tokenizer, train_clip_bpe
from clipdistill_jax.data.wordpiece import train_wordpiece


def open_tokenizer(name: str, kind: str, texts: Callable[[], Iterable[str]], folder: Path) -> Tokenizer:
    """A Hugging Face directory's or hub id's; "train:N" is trained once, in `folder`.

    Args:
      name: as in the config.
      kind: "clip" or "bert": what is trained.
      texts: of the training split.
    """
    if not name.startswith("train:"):
        return Tokenizer.from_dir(name)
    if not (folder / "tokenizer.json").exists():
        train = train_wordpiece if kind == "bert" else train_clip_bpe
        train(texts(), int(name.removeprefix("train:")), folder)
    return Tokenizer.from_dir(folder)
