"""The importance of the words of questions and choices: scored once at preparation, fed with the batches."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int64

from clipdistill_jax.data.formats.vcr import Words
from clipdistill_jax.data.importance import read_importance, word_importance, write_importance
from clipdistill_jax.data.index import read_manifest
from clipdistill_jax.data.questions.index import AND, read_items
from clipdistill_jax.data.questions.items import Question
from clipdistill_jax.data.questions.layout import check_clip_text
from clipdistill_jax.data.questions.words import Ragged
from clipdistill_jax.data.words import split_words

IMPORTANCE = "importance"  # the folder


def said(question: Question, choice: int, clip_text: str) -> tuple[Words, ...]:
    """The texts that CLIP reads for a choice: context and choice, or the choice alone."""
    return (*(question.context if clip_text == "both" else ()), question.choices[choice])


def importance_file(directory: Path, split: str, kind: str, clip_text: str) -> Path:
    """Where the importance of words is stored: a row a choice, items in order."""
    return directory / IMPORTANCE / f"{split}.{kind}.{clip_text}.npz"


def ensure_importance(
    directory: Path, clip_text: str, kinds: Sequence[str], *, workers: int, progress: bool
) -> None:
    """Computes the importance of the words of all texts of a prepared folder, where that is not done yet.

    Objects are called by their class, two of one tag joined by "and". A row has a number for each word of
    `words.Texts` but the joiners.

    Raises:
      ValueError: clip_text is neither "both" nor "choice".
    """
    check_clip_text(clip_text)
    for split in read_manifest(directory)["splits"]:
        for kind in kinds:
            path = importance_file(directory, split, kind, clip_text)
            if path.exists():
                continue
            aloud = _Aloud()
            texts, units = [], []
            for question in read_items(directory, split, (kind,)):
                for k in range(len(question.choices)):
                    text, lengths = aloud.read(question, k, clip_text)
                    texts.append(text)
                    units.append(lengths)
            scores = word_importance(texts, workers=workers, progress=progress)
            path.parent.mkdir(exist_ok=True)
            write_importance(path, texts, [_by_unit(s, u) for s, u in zip(scores, units, strict=True)])


class _Aloud:
    """Texts as they are scored: one string each, and the words that each unit of it takes there."""

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}

    def _length(self, item: str) -> int:
        if item not in self._lengths:
            self._lengths[item] = len(split_words([item])[0])
        return self._lengths[item]

    def read(self, question: Question, choice: int, clip_text: str) -> tuple[str, list[int]]:
        """The text of a choice; the words of each word or object, -1 for a joiner."""
        words: list[str] = []
        units: list[int] = []
        for item in itertools.chain.from_iterable(said(question, choice, clip_text)):
            if isinstance(item, str):
                words.append(item)
                units += [1] * self._length(item)
                continue
            for k, index in enumerate(item):
                words += [AND] * (k > 0) + [question.objects[index]]
                units += [-1] * (k > 0) + [self._length(question.objects[index])]
        return " ".join(words), units


def _by_unit(scores: Float32[np.ndarray, " words"], units: list[int]) -> Float32[np.ndarray, " units"]:
    """The sum over each unit's words, without the joiners."""
    lengths = np.array(units, np.int64)
    unit = np.repeat(np.arange(len(lengths)), np.abs(lengths))
    sums = np.bincount(unit, scores, minlength=len(lengths))
    return sums[lengths >= 0].astype(np.float32)


class StoredImportance:
    """What `ensure_importance` stored for the items of one kind."""

    def __init__(self, directory: Path, split: str, kind: str, clip_text: str) -> None:
        """Reads it.

        Raises:
          FileNotFoundError: it was not prepared.
        """
        self._path = importance_file(directory, split, kind, clip_text)
        self._stored = read_importance(self._path, None)
        self._said = slice(None) if clip_text == "both" else slice(-1, None)

    def rows(
        self,
        texts: Int64[np.ndarray, " r"],
        parts: Int[np.ndarray, "r p"],
        joiners: Ragged,
        shift: Int64[np.ndarray, " r"],
        slots: int,
    ) -> Float32[np.ndarray, "r s"]:
        """Slot i has the importance of word i; joiners have 0.

        Args:
          texts: place of each text among the stored ones.
          parts: its parts, as numbers of texts of the split.
          joiners: 1 for the words of each of these that are joiners.
          shift: word that is number 0.
          slots: S.

        Raises:
          ValueError: what is stored belongs to other texts.
        """
        found = np.zeros((len(texts), slots), np.float32)
        starts, values = self._stored.starts, self._stored.values
        if len(texts) and texts.max() >= len(starts) - 1:
            raise self._other_texts()
        for r, text in enumerate(texts.tolist()):
            words = [joiners.values[joiners.starts[p] : joiners.starts[p + 1]] for p in parts[r].tolist()]
            joiner = np.concatenate(words[self._said])
            stored = values[starts[text] : starts[text + 1]]
            if len(stored) != len(joiner) - joiner.sum():
                raise self._other_texts()
            shares = np.zeros(len(joiner), np.float32)
            shares[joiner == 0] = stored
            first = sum(map(len, words)) - len(shares) - int(shift[r])
            shares, first = shares[max(-first, 0) :], max(first, 0)
            found[r, first : first + len(shares)] = shares[: slots - first]
        return found

    def _other_texts(self) -> ValueError:
        return ValueError(f"{self._path} was made for other texts: remove it and prepare the data again")
