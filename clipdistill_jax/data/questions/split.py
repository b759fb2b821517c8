"""A split of questions in memory: texts as tokens, labels, lengths. Images and regions stay on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from clipdistill_jax.data.protocol import Selection
from clipdistill_jax.data.questions import index
from clipdistill_jax.data.questions.importance import StoredImportance
from clipdistill_jax.data.questions.items import KINDS
from clipdistill_jax.data.questions.layout import (
    Cut,
    Rows,
    StudentText,
    Template,
    clip_template,
    cut,
    lay_out,
)
from clipdistill_jax.data.questions.words import (
    JOINER,
    Encoded,
    Lexicon,
    Ragged,
    TextBuilder,
    encode,
    word_tokens,
)
from clipdistill_jax.data.text import Tokenizer


class Reading(NamedTuple):
    """How texts are read.

    Attributes:
      student: of the student.
      max_tokens: its longest sequence.
      clip: CLIP's tokenizer; None where no CLIP reads.
      clip_tokens: the length of CLIP's sequences.
      clip_text: "both" context and choice, or the "choice" alone.
    """

    student: StudentText
    max_tokens: int
    clip: Tokenizer | None
    clip_tokens: int
    clip_text: str

    def clip_template(self, parts: int) -> Template:
        return clip_template(parts, self.clip_text)


class QuestionSplit:
    """The items of a split, in the order of the index.

    Attributes:
      example_ids, record_ids, categories, groups: of each item; see `items.Question`.
      kind, image, label, given: the same as numbers; kind is an index into KINDS.
      regions: regions of each item's image, the whole image included.
    """

    def __init__(self, directory: Path, name: str, kinds: Sequence[str], reading: Reading) -> None:
        self.name, self._directory, self._reading = name, directory, reading
        lexicon = Lexicon()
        texts = TextBuilder(lexicon, reading.student.joiner)
        self.example_ids: list[str] = []
        self.record_ids: list[str] = []
        self.categories: list[str] = []
        self.groups: list[str] = []
        numbers, contexts, choices, scores = [], [], [], []
        for item in index.read_items(directory, name, kinds):
            self.example_ids.append(item.example_id)
            self.record_ids.append(item.record_id)
            self.categories.append(item.category)
            self.groups.append(item.group)
            context, chosen = texts.add(item, reading.student.names(item))
            contexts.append(context)
            choices.append(chosen)
            numbers.append((KINDS.index(item.kind), item.image, item.label, item.given))
            scores.append(item.scores)
        if not numbers:
            raise ValueError(f"{directory}: the split {name!r} has no items of the kinds {', '.join(kinds)}")
        self.kind, self.image, self.label, self.given = np.array(numbers, np.int64).T
        self.image_names, counts = index.read_images(directory, name)
        self.regions = counts[self.image]
        self._contexts, self._choices = contexts, np.array(choices, np.int64)
        self._score_starts = np.cumsum([0, *(len(s or ()) for s in scores)], dtype=np.int64)
        rows = [(k, *both) for s in scores for k, both in (s or {}).items()]
        self._scores = np.array(rows, np.float32).reshape(-1, 3)  # class, soft score, official accuracy
        self.answered = np.array([s is not None for s in scores])

        found = texts.build()
        self._word_counts = found.objects.counts
        self._joiners = Ragged((found.objects.values == JOINER).astype(np.int32), found.objects.starts)
        student = reading.student
        table = word_tokens(lexicon.words, student.tokenizer, student.special_words)
        self._student = encode(found.student, found.objects, table)
        self._clip: Encoded | None = None
        if reading.clip is not None:
            table = word_tokens(lexicon.words, reading.clip, {})
            self._clip = encode(found.names, found.objects, table)
        self._importance: dict[int, tuple[StoredImportance, np.ndarray]] = {}
        self._check_lengths()

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def student(self) -> StudentText:
        """How the student reads."""
        return self._reading.student

    @property
    def num_choices(self) -> int:
        """K."""
        return self._choices.shape[1]

    def _parts(self, items: np.ndarray) -> Int64[np.ndarray, "r p"]:
        """Texts of each choice of items of one kind: those of the context, then the choice; B K rows."""
        context = np.array([self._contexts[k] for k in items.tolist()], np.int64).reshape(len(items), -1)
        choices = self._choices[items]
        rows = np.repeat(context, choices.shape[1], axis=0)
        return np.concatenate([rows, choices.reshape(-1, 1)], axis=1)

    def _check_lengths(self) -> None:
        """Lengths of all rows, and what does not fit."""
        lengths = np.zeros((len(self), self.num_choices), np.int64)
        self.cut = dict.fromkeys(("student", "student_choice", "clip", "clip_choice"), 0)
        for kind in np.unique(self.kind):
            items = np.flatnonzero(self.kind == kind)
            parts = self._parts(items)
            template = self._reading.student.templates[KINDS[kind]]
            whole = self._count("student", self._student, parts, template, self._reading.max_tokens)
            # Words without a token have a number too, and need a place.
            words = np.minimum(self._word_counts[parts].sum(1), self._reading.max_tokens)
            whole = np.maximum(np.minimum(whole, self._reading.max_tokens), words)
            lengths[items] = whole.reshape(len(items), -1)
            if self._clip is not None:
                template = self._reading.clip_template(parts.shape[1])
                self._count("clip", self._clip, parts, template, self._reading.clip_tokens)
        self.row_lengths = lengths
        self.lengths = np.stack([lengths.max(1), self.regions], axis=1)

    def _count(
        self, name: str, encoded: Encoded, parts: np.ndarray, template: Template, limit: int
    ) -> np.ndarray:
        """The rows' lengths; counts those whose context, and whose choice too, is cut."""
        said = [part for part, _ in template if isinstance(part, int)]
        special = len(template) - len(said)
        if limit <= special:
            raise ValueError(f"{limit} tokens leave no room for a text beside {special} special ones")
        whole = encoded.counts[parts[:, said]].sum(1) + special
        self.cut[name] += int((whole > limit).sum())
        self.cut[f"{name}_choice"] += int((encoded.counts[parts[:, -1]] + special > limit).sum())
        return whole

    def text(
        self, items: Int64[np.ndarray, " b"], length: int, *, student: bool, clip: bool
    ) -> dict[str, np.ndarray]:
        """What a batch says: the student's arrays [b, K, length], and CLIP's [b, K, Tc].

        Args:
          items: indices.
          length: T.
          student: give tokens, token_mask, types, word_ids, token_regions.
          clip: give clip_tokens, clip_token_mask, clip_word_ids, importance.
        """
        shape = (len(items), self.num_choices)
        batch: dict[str, np.ndarray] = {}

        def put(names: dict[str, np.ndarray], places: np.ndarray) -> None:
            for name, rows in names.items():
                if name not in batch:
                    batch[name] = np.zeros((*shape, rows.shape[1]), rows.dtype)
                batch[name][places] = rows.reshape(-1, self.num_choices, rows.shape[1])

        for kind in np.unique(self.kind[items]):
            places = np.flatnonzero(self.kind[items] == kind)
            parts = self._parts(items[places])
            words = self._word_counts[parts]
            template = self._reading.student.templates[KINDS[kind]]
            fitted = cut(self._student, parts, words, template, self._reading.max_tokens)
            # Every word that is numbered has a slot, here and at CLIP, though it have no token.
            slots = self._reading.max_tokens
            if self._clip is not None:
                slots = min(slots, self._reading.clip_tokens)
            shift = np.maximum(fitted.first, words.sum(1) - slots)
            if student:
                special = self._reading.student.special_tokens
                rows = lay_out(self._student, parts, words, template, special, fitted, shift, length)
                put(_student_arrays(rows), places)
            if clip:
                put(self._clip_arrays(int(kind), items[places], parts, words, shift), places)
        return batch

    def _clip_arrays(
        self, kind: int, items: np.ndarray, parts: np.ndarray, words: np.ndarray, shift: np.ndarray
    ) -> dict[str, np.ndarray]:
        tokenizer, length = self._reading.clip, self._reading.clip_tokens
        if tokenizer is None or self._clip is None:
            raise ValueError("the questions were opened without CLIP's tokenizer")
        template = self._reading.clip_template(parts.shape[1])
        fitted: Cut = cut(self._clip, parts, words, template, length)
        special = {"begin": tokenizer.bos_id, "end": tokenizer.eot_id}
        rows = lay_out(self._clip, parts, words, template, special, fitted, shift, length)
        importance, place = self._read_importance(kind)
        texts = place[items][:, None] * self.num_choices + np.arange(self.num_choices)
        return {
            "clip_tokens": rows.tokens,
            "clip_token_mask": rows.mask,
            "clip_word_ids": rows.words,
            "importance": importance.rows(texts.ravel(), parts, self._joiners, shift, length),
        }

    def _read_importance(self, kind: int) -> tuple[StoredImportance, np.ndarray]:
        """What was stored for a kind of items, and each item's place among those of its kind."""
        if kind not in self._importance:
            stored = StoredImportance(self._directory, self.name, KINDS[kind], self._reading.clip_text)
            self._importance[kind] = (stored, np.cumsum(self.kind == kind) - 1)
        return self._importance[kind]

    def targets(self, items: np.ndarray, classes: int, official: bool = False) -> Float32[np.ndarray, "b v"]:
        """VQA's soft scores, to learn; or the official accuracy of each class."""
        found = np.zeros((len(items), classes), np.float32)
        for row, k in enumerate(items.tolist()):
            said = self._scores[self._score_starts[k] : self._score_starts[k + 1]]
            found[row, said[:, 0].astype(np.int64)] = said[:, 1 + official]
        return found

    def has_label(self) -> Bool[np.ndarray, " n"]:
        """Whether the dataset says what is right."""
        return self.answered | (self.label >= 0)

    def selected(self, selection: Selection | None) -> tuple[Int64[np.ndarray, " m"], Bool[np.ndarray, " n"]]:
        """Items to feed, and of every item whether its label may be used; None is all.

        Of an unlabelled record of VCR "qa" alone is fed: "qar" would show its right answer.

        Raises:
          ValueError: a selected record is not in the split.
        """
        known = self.has_label()
        if selection is None:
            return np.arange(len(self)), known
        labelled, unlabelled = set(selection.labelled), set(selection.unlabelled)
        lost = sorted((labelled | unlabelled) - set(self.record_ids))
        if lost:
            raise ValueError(
                f"{len(lost)} selected records are not in the split {self.name!r}, for example {lost[0]!r}"
            )
        shown = np.array([i in labelled for i in self.record_ids])
        hidden = np.array([i in unlabelled for i in self.record_ids])
        return np.flatnonzero(shown | (hidden & (self.given < 0))), known & shown

    def digest(self) -> str:
        """Hash of the items' texts and labels as they are fed."""
        digest = hashlib.sha256("\n".join(self.example_ids).encode())
        encoded = [self._student] + ([self._clip] if self._clip is not None else [])
        arrays: list[np.ndarray] = [a for texts in encoded for a in texts]
        arrays += [self.kind, self.image, self.label, self.given, self._choices, self._scores]
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _student_arrays(rows: Rows) -> dict[str, Int32[np.ndarray, "r t"] | Bool[np.ndarray, "r t"]]:
    return {
        "tokens": rows.tokens,
        "token_mask": rows.mask,
        "types": rows.types,
        "word_ids": rows.words,
        "token_regions": rows.regions,
    }
