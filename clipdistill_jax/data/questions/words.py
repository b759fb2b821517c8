"""Texts as words that are the same for every model, and the tokens of each word by each tokenizer.

A text is divided once. What `split_words` makes of it are its words, and each object of a tag is one word,
whatever it is called: "person" for CLIP, person_3 for UNITER, "Riley" for VL-BERT. Tokenizers encode each
different word once, so word i of a text is the same for all of them.
"""

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt16

from clipdistill_jax.data.formats.vcr import Words
from clipdistill_jax.data.questions.items import Question
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.words import split_words

JOINER = -2  # in place of an object: the word between the names of one tag
NO_OBJECT = -1


class Lexicon:
    """Numbers of different words, in the order of their first use.

    Attributes:
      words: as the texts write them; a tag's name is one of them, though it be of several words.
    """

    def __init__(self) -> None:
        self.words: list[str] = []
        self._number: dict[str, int] = {}
        self._parts: dict[str, tuple[int, ...]] = {}

    def name(self, name: str) -> int:
        """The number of a name that is one word."""
        if name not in self._number:
            self._number[name] = len(self.words)
            self.words.append(name)
        return self._number[name]

    def parts(self, item: str) -> tuple[int, ...]:
        """The numbers of the words that an item of a text is divided into."""
        if item not in self._parts:
            (words,) = split_words([item], keep_case=True)
            self._parts[item] = tuple(map(self.name, words))
        return self._parts[item]


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other; row r is values[starts[r] : starts[r + 1]]."""

    values: Int[np.ndarray, " total"] | UInt16[np.ndarray, " total"]
    starts: Int64[np.ndarray, " rows_and_1"]

    @property
    def counts(self) -> Int64[np.ndarray, " rows"]:
        return np.diff(self.starts)


class Texts(NamedTuple):
    """All texts of a split, in words.

    Attributes:
      names: word of each place, tags by the class of their object.
      student: the same, tags by the student's names.
      objects: object that the word names; NO_OBJECT, or JOINER.
    """

    names: Ragged
    student: Ragged
    objects: Ragged


class Encoded(NamedTuple):
    """All texts of a split, in one model's tokens.

    Attributes:
      tokens: ids.
      words: index of each token's word in its text.
      regions: region that the token speaks of: its object's index plus 1, 0 for none.
      starts: where each text begins in them, and the end of the last.
    """

    tokens: Int[np.ndarray, " total"] | UInt16[np.ndarray, " total"]
    words: Int[np.ndarray, " total"] | UInt16[np.ndarray, " total"]
    regions: Int[np.ndarray, " total"] | UInt16[np.ndarray, " total"]
    starts: Int64[np.ndarray, " texts_and_1"]

    @property
    def counts(self) -> Int64[np.ndarray, " texts"]:
        return np.diff(self.starts)


def text_words(
    text: Words, objects: Sequence[str], names: Sequence[str], joiner: str, lexicon: Lexicon
) -> Iterable[tuple[int, int, int]]:
    """(word by class name, word by the student's name, object) of each place of a text."""
    for item in text:
        if isinstance(item, str):
            for word in lexicon.parts(item):
                yield word, word, NO_OBJECT
            continue
        for k, index in enumerate(item):
            if k and joiner:
                word = lexicon.name(joiner)
                yield word, word, JOINER
            yield lexicon.name(objects[index]), lexicon.name(names[index]), index


def choice_words(question: Question, joiner: str) -> list[tuple[str, ...]]:
    """The words of each choice as a model's word ids count them: those of the context, then its own."""
    lexicon = Lexicon()
    texts = [
        tuple(
            lexicon.words[word]
            for word, _, _ in text_words(text, question.objects, question.objects, joiner, lexicon)
        )
        for text in (*question.context, *question.choices)
    ]
    asked = tuple(word for words in texts[: len(question.context)] for word in words)
    return [(*asked, *words) for words in texts[len(question.context) :]]


class TextBuilder:
    """Collects the texts of a split.

    Args:
      lexicon: numbers the words.
      joiner: word put between the names of a tag of several objects; "" for none.
    """

    def __init__(self, lexicon: Lexicon, joiner: str) -> None:
        self._lexicon, self._joiner = lexicon, joiner
        self._places = array("i")  # three numbers a word, one word after the other
        self._counts: list[int] = []

    def add(self, question: Question, names: Sequence[str]) -> tuple[list[int], list[int]]:
        """Adds a question's texts; gives the numbers of its context's texts, and of its choices."""
        first = len(self._counts)
        for text in (*question.context, *question.choices):
            before = len(self._places)
            for place in text_words(text, question.objects, names, self._joiner, self._lexicon):
                self._places.extend(place)
            self._counts.append((len(self._places) - before) // 3)
        middle = first + len(question.context)
        return list(range(first, middle)), list(range(middle, len(self._counts)))

    def build(self) -> Texts:
        """All texts that were added."""
        places = np.array(self._places, np.int32).reshape(-1, 3)
        starts = np.cumsum([0, *self._counts], dtype=np.int64)
        names, student, objects = (Ragged(np.ascontiguousarray(column), starts) for column in places.T)
        return Texts(names, student, objects)


def word_tokens(words: Sequence[str], tokenizer: Tokenizer, special: Mapping[str, int]) -> Ragged:
    """The ids of each word.

    Args:
      words: of a lexicon.
      tokenizer: any.
      special: words that have an id of their own.
    """
    ids = [[special[w]] if w in special else None for w in words]
    plain = [w for w, found in zip(words, ids, strict=True) if found is None]
    encoded = iter(tokenizer.encode_words(plain))
    rows = [next(encoded) if found is None else found for found in ids]
    values = np.array([k for row in rows for k in row], np.int32)
    return Ragged(values, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def encode(words: Ragged, objects: Ragged, table: Ragged) -> Encoded:
    """The tokens of all texts.

    Args:
      words, objects: of the texts.
      table: the ids of each word of the lexicon.
    """
    lengths = table.counts[words.values]
    place = np.repeat(np.arange(len(words.values)), lengths)
    ends = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
    tokens = table.values[table.starts[words.values][place] + np.arange(len(place)) - ends[place]]
    within = np.arange(len(words.values)) - np.repeat(words.starts[:-1], words.counts)
    regions = np.maximum(objects.values, NO_OBJECT) + 1
    return Encoded(_small(tokens), _small(within[place]), _small(regions[place]), ends[words.starts])


def _small(values: np.ndarray) -> np.ndarray:
    """In 16 bits where they fit: a split of VCR has tens of millions of tokens."""
    return values.astype(np.uint16 if values.max(initial=0) < 2**16 else np.int32)
