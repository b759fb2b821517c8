"""Where the parts of a text stand: the students' sequences and CLIP's, for many texts at once."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from clipdistill_jax.data.formats.vcr import PERSON, UNITER_PERSONS, uniter_names
from clipdistill_jax.data.questions.items import Question
from clipdistill_jax.data.questions.words import Encoded
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.wordpiece import MASK

CLIP_TEXTS = ("both", "choice")
# (a special token or the number of a part, its segment), in the order of the sequence. Parts are those of the
# context, then the choice.
Template = tuple[tuple[str | int, int], ...]
STUDENTS: dict[str, dict[str, Template]] = {
    "uniter": {  # UNITER data/vcr.py:102-157; data/vqa.py, data/ve.py
        "qa": (("begin", 0), (0, 0), ("end", 2), (1, 2), ("end", 2)),
        "qar": (("begin", 0), (0, 0), ("end", 2), (1, 2), ("end", 3), (2, 3), ("end", 3)),
        "ve": (("begin", 0), (0, 0), ("end", 0)),
        "vqa": (("begin", 0), (0, 0), ("end", 0)),
    },
    "vl_bert": {  # VL-BERT vcr/data/datasets/vcr.py:411-417, vqa/modules; SNLI-VE is ours
        "qa": (("begin", 0), (0, 0), ("end", 0), (1, 1), ("end", 1)),
        "qar": (("begin", 0), (0, 0), (1, 0), ("end", 0), (2, 1), ("end", 1)),
        "ve": (("begin", 0), (0, 0), ("end", 0)),
        "vqa": (("begin", 0), (0, 0), ("end", 0), ("mask", 1), ("end", 1)),
    },
}


@dataclasses.dataclass(frozen=True)
class StudentText:
    """How a student reads a text.

    Attributes:
      kind: "uniter" (VILLA too) or "vl_bert".
      tokenizer: BERT's.
      persons: whether the texts have tags: UNITER then has 81 more entries, person_0 to person_80, behind
        those of its tokenizer (28996 + i with bert-base-cased).
    """

    kind: str
    tokenizer: Tokenizer
    persons: bool = True

    def __post_init__(self) -> None:
        if self.kind not in STUDENTS:
            raise ValueError(f"the student {self.kind!r} is not known: choose one of {', '.join(STUDENTS)}")

    @property
    def templates(self) -> dict[str, Template]:
        return STUDENTS[self.kind]

    @property
    def joiner(self) -> str:
        """Between the names of a tag of several objects."""
        return "and" if self.kind == "vl_bert" else ""

    @property
    def image_inset(self) -> int:
        """Pixels between the box of the whole image and the far corner (VL-BERT vcr/data/datasets/vcr.py)."""
        return 1 if self.kind == "vl_bert" else 0

    @property
    def vocab_size(self) -> int:
        """Rows that a token embedding needs."""
        return self.tokenizer.vocab_size + len(self.special_words)

    @property
    def special_words(self) -> dict[str, int]:
        """Words that are a token by themselves."""
        if self.kind != "uniter" or not self.persons:
            return {}
        return {f"{PERSON}_{i}": self.tokenizer.vocab_size + i for i in range(UNITER_PERSONS)}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens of the templates."""
        mask = self.tokenizer.backend.token_to_id(MASK)
        if mask is None:
            raise ValueError(f"the student's tokenizer has no {MASK}: it is no BERT tokenizer")
        return {"begin": self.tokenizer.bos_id, "end": self.tokenizer.eot_id, "mask": mask}

    def names(self, question: Question) -> tuple[str, ...]:
        """What the student calls the objects."""
        return question.names if self.kind == "vl_bert" else uniter_names(question.objects)


def check_clip_text(text: str) -> None:
    """Raises ValueError for what is neither "both" nor "choice"."""
    if text not in CLIP_TEXTS:
        raise ValueError(f"clip_text={text!r} must be one of {', '.join(CLIP_TEXTS)}")


def clip_template(parts: int, text: str) -> Template:
    """CLIP's sequence of so many parts: all of them ("both") or the choice alone ("choice")."""
    check_clip_text(text)
    said = range(parts) if text == "both" else (parts - 1,)
    return (("begin", 0), *((k, 0) for k in said), ("end", 0))


class Cut(NamedTuple):
    """What of each part fits, for R texts of P parts. A part that the template leaves out is whole.

    Attributes:
      skip: tokens left out at the front of each part.
      keep: tokens that stay.
      first: word of the whole text that comes first of those that stay; 0 where nothing is left out.
    """

    skip: Int64[np.ndarray, "r p"]
    keep: Int64[np.ndarray, "r p"]
    first: Int64[np.ndarray, " r"]


class Rows(NamedTuple):
    """R sequences of T tokens; see `models.joint`. `regions` is its token_regions."""

    tokens: Int32[np.ndarray, "r t"]
    mask: Bool[np.ndarray, "r t"]
    types: Int32[np.ndarray, "r t"]
    words: Int32[np.ndarray, "r t"]
    regions: Int32[np.ndarray, "r t"]


def cut(
    encoded: Encoded,
    parts: Int[np.ndarray, "r p"],
    word_counts: Int64[np.ndarray, "r p"],
    template: Template,
    limit: int,
) -> Cut:
    """Fits texts into `limit` tokens: the context loses whole words from its front, the choice none.

    Only a choice that is too long by itself loses tokens, from its end.

    Args:
      encoded: the texts.
      parts: number of the text of each part.
      word_counts: words of each part.
      template: the sequence.
      limit: tokens of a sequence, special ones included.
    """
    skip = np.zeros(parts.shape, np.int64)
    keep = encoded.counts[parts]
    first = np.zeros(len(parts), np.int64)
    said = [part for part, _ in template if isinstance(part, int)]
    room = limit - (len(template) - len(said))
    for row in np.flatnonzero(keep[:, said].sum(1) > room):
        over = int(keep[row, said].sum()) - room
        for part in said[:-1]:
            start, count = int(encoded.starts[parts[row, part]]), int(keep[row, part])
            dropped = min(max(over, 0), count)
            if 0 < dropped < count:  # no word stays by half
                words = encoded.words[start : start + count]
                dropped = int(np.searchsorted(words, words[dropped - 1], side="right"))
            skip[row, part], keep[row, part] = dropped, count - dropped
            over -= dropped
        keep[row, said[-1]] -= max(over, 0)
        # The choice comes first also where all of the context is dropped, and the choice has no token.
        part = next((part for part in said if keep[row, part]), said[-1])
        first[row] = word_counts[row, :part].sum()
        if keep[row, part]:
            first[row] += encoded.words[encoded.starts[parts[row, part]] + skip[row, part]]
    return Cut(skip, keep, first)


def lay_out(
    encoded: Encoded,
    parts: Int[np.ndarray, "r p"],
    word_counts: Int64[np.ndarray, "r p"],
    template: Template,
    special: dict[str, int],
    fitted: Cut,
    shift: Int64[np.ndarray, " r"],
    length: int,
) -> Rows:
    """The sequences of texts.

    Args:
      encoded, parts, word_counts, template, fitted: as in `cut`, and its result.
      special: ids of the special tokens.
      shift: word that is number 0, the words before it are -1.
      length: T.

    Raises:
      ValueError: a text is longer than T.
    """
    count = len(parts)
    zeros = [np.zeros((count, length), np.int32) for _ in range(3)]
    rows = Rows(zeros[0], np.zeros((count, length), bool), zeros[1], np.full_like(zeros[0], -1), zeros[2])
    offset = np.zeros(count, np.int64)
    words_before = np.cumsum(word_counts, axis=1) - word_counts
    for part, segment in template:
        if isinstance(part, str):
            place = (np.arange(count), offset)
            _check_length(offset, length - 1)
            rows.tokens[place] = special[part]
            rows.types[place] = segment
            offset = offset + 1
            continue
        kept = fitted.keep[:, part]
        _check_length(offset + kept, length)
        row = np.repeat(np.arange(count), kept)
        within = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
        source = (encoded.starts[parts[:, part]] + fitted.skip[:, part])[row] + within
        place = (row, offset[row] + within)
        rows.tokens[place] = encoded.tokens[source]
        rows.types[place] = segment
        rows.regions[place] = encoded.regions[source]
        number = encoded.words[source].astype(np.int64) + (words_before[:, part] - shift)[row]
        rows.words[place] = np.maximum(number, -1)
        offset = offset + kept
    rows.mask[:] = np.arange(length) < offset[:, None]
    return rows


def _check_length(ends: np.ndarray, length: int) -> None:
    if ends.size and ends.max() > length:
        raise ValueError(f"a text has more than the {length} tokens of its batch")
