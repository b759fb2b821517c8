"""Batches of questions from prepared records; each a pure function of its step."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from clipdistill_jax.data import graph
from clipdistill_jax.data import index as files
from clipdistill_jax.data.bpe import CONTEXT
from clipdistill_jax.data.plan import check_ids, check_sizes
from clipdistill_jax.data.protocol import Selection
from clipdistill_jax.data.questions import index
from clipdistill_jax.data.questions.buckets import (
    BUCKETS,
    QuestionPlan,
    Shape,
    choose_shapes,
    evaluation_rows,
    padding,
    shape_of,
)
from clipdistill_jax.data.questions.feed import StepRows, masked_ids, picture_batches, question_batches
from clipdistill_jax.data.questions.items import KINDS
from clipdistill_jax.data.questions.layout import StudentText, check_clip_text
from clipdistill_jax.data.questions.reading import read_steps
from clipdistill_jax.data.questions.split import QuestionSplit, Reading
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.vocabulary import AnswerVocabulary, read_vocabulary
from clipdistill_jax.data.workers import available_cores


class QuestionData:
    """A prepared dataset of questions about images as batches.

    A batch is a dictionary of NumPy arrays; B items, K choices (VCR 4, else 1), T tokens, N regions, C
    features. T and N are those of one of a few shapes. As `models.joint` says:
      tokens, types, word_ids, token_regions int32 [B, K, T], token_mask bool [B, K, T]
      regions float32 [B, N, C], region_boxes [B, N, 4], region_mask bool [B, N], image_size [B, 2]: the whole
        image, annotated regions, detected ones. VL-BERT's image ends at (w - 1, h - 1) where sizes are pixels
    and
      region_classes int32 [B, N]: the object's class, see `object_classes`; -1 for none
      label int32 [B]: the right choice, or SNLI-VE's label; -1 where unknown or hidden
      targets float32 [B, V]: VQA's soft scores, in an evaluation the official accuracies; zeros where unknown
        or hidden
      labelled bool [B]: whether the label (or the targets) may be used
      example_id int32 [B]: the item's index in the split; image_id int32 [B]: the image's
      mask bool [B]: False on the rows that fill an evaluation's last batch
    On demand
      image uint8 [B, H, W, 3]: the centre square of the picture
      clip_tokens, clip_word_ids int32 [B, K, Tc], clip_token_mask bool, importance float32 [B, K, Tc]: what
        CLIP reads, and the importance of word i in slot i
      class_probs float32 [B, N, Kc]: the detector's distribution over classes
    Word i is the same word in word_ids, clip_word_ids and importance. A text's words are counted over
    context and choice; where a text is so long that it does not fit, word 0 is a later one, and words before
    it have -1.

    Iterators end their threads when they are dropped; `close()` does it at once.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        student: StudentText,
        clip: Tokenizer | None = None,
        max_tokens: int = 220,
        clip_tokens: int = CONTEXT,
        clip_text: str = "both",
        image_size: int = 224,
        questions: Sequence[str] = KINDS,
        buckets: int = BUCKETS,
        num_threads: int | None = None,
    ) -> None:
        """Opens a folder that `prepare_questions` made. Splits are loaded at their first use.

        Args:
          directory: the prepared folder.
          student: how the student reads texts.
          clip: CLIP's tokenizer; None where no batch shall have CLIP's texts.
          max_tokens: the student's longest sequence. Of a longer one the context loses words from its front.
          clip_tokens: Tc; the same holds for CLIP's texts.
          clip_text: CLIP reads "both" context and choice, or the "choice" alone.
          image_size: H = W.
          questions: kinds of items to feed, e.g. ("qa",) for VCR's answers alone.
          buckets: most batch shapes of a split.
          num_threads: threads that decode; one a core when None.

        Raises:
          FileNotFoundError: the folder is not prepared.
          ValueError: it holds no questions, or an argument is not possible.
        """
        self.directory = Path(directory)
        self.manifest = files.read_manifest(directory)
        if "object_classes" not in self.manifest:
            raise ValueError(f"{directory} holds no questions about images: prepare them first")
        unknown = sorted(set(questions) - set(KINDS))
        if unknown or not questions:
            raise ValueError(f"questions={tuple(questions)!r} must be some of {', '.join(KINDS)}")
        self.kinds = tuple(questions)
        self._reading = Reading(student, max_tokens, clip, clip_tokens, clip_text)
        check_clip_text(clip_text)
        self._image_size, self._buckets = image_size, buckets
        self._num_threads = num_threads or available_cores()
        self._loaded: dict[str, QuestionSplit] = {}
        self._opened: dict[str, Any] = {}
        self.answers: AnswerVocabulary | None = None
        if self.manifest["answers"]:
            self.answers = read_vocabulary(self.directory / index.ANSWERS)
            self.answers.check(self.manifest["answers"]["fingerprint"], str(self.directory))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.manifest["splits"])

    @property
    def object_classes(self) -> tuple[str, ...]:
        """Names of the regions' classes, background first; empty where the dataset has no objects."""
        return tuple(self.manifest["object_classes"])

    @property
    def region_classes(self) -> int:
        """Kc, background included; 0 where there are no distributions."""
        return int(self.manifest["region_classes"])

    def split(self, name: str) -> QuestionSplit:
        """A split in memory.

        Raises:
          KeyError: there is no such split.
        """
        if name not in self._loaded:
            self._loaded[name] = QuestionSplit(self.directory, name, self.kinds, self._reading)
        return self._loaded[name]

    def num_items(self, split: str = "train") -> int:
        """Items of an epoch without a selection."""
        return len(self.split(split))

    def lengths(self, split: str) -> Int[np.ndarray, "n 2"]:
        """Tokens of the longest choice, and regions, of each item."""
        return self.split(split).lengths

    def shapes(self, split: str) -> tuple[Shape, ...]:
        """What batches of a split are padded to: those of "train", the last one larger where it must be."""
        names = self.splits
        chosen = choose_shapes(self.lengths("train" if "train" in names else split), self._buckets)
        most = np.maximum(self.lengths(split).max(0), chosen[-1])
        return (*chosen[:-1], Shape(*most.tolist()))

    def fill(self, split: str) -> float:
        """Share of the places of a split's batches that are real, all choices counted."""
        loaded = self.split(split)
        return 1 - padding(loaded.row_lengths, loaded.regions, self.shapes(split))

    def cut(self, split: str) -> dict[str, int]:
        """Texts (choices of items) that did not fit: "student" and "clip" lost words of their context,
        "student_choice" and "clip_choice" the end of the choice too."""
        return dict(self.split(split).cut)

    def groups(self, split: str = "train") -> dict[str, str]:
        """Record id -> what the protocols draw from (see `data.protocol.select`)."""
        loaded = self.split(split)
        return dict(zip(loaded.record_ids, loaded.groups, strict=True))

    def describe(self, split: str) -> dict[str, Any]:
        """What a report needs, an entry an item: example_ids, record_ids, kinds, given (index of the answer
        in the context, -1), categories, labels, contexts and choices (texts, objects by their class), images
        (names)."""
        loaded = self.split(split)
        contexts, choices = index.read_texts(self.directory, split, self.kinds)
        return {
            "example_ids": np.array(loaded.example_ids),
            "record_ids": np.array(loaded.record_ids),
            "kinds": np.array(KINDS)[loaded.kind],
            "given": loaded.given,
            "categories": np.array(loaded.categories),
            "labels": loaded.label,
            "contexts": contexts,
            "choices": choices,
            "images": np.array(loaded.image_names)[loaded.image],
        }

    def fingerprint(self, split: str) -> str:
        """Of the split's images and texts as they are fed."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        digest.update(self.split(split).digest().encode())
        reading = self._reading
        digest.update(f"{self._image_size} {reading.clip_tokens} {reading.clip_text}".encode())
        return digest.hexdigest()[:16]

    def batches(
        self,
        start_step: int = 0,
        *,
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        selection: Selection | None = None,
        images: bool = False,
        clip: bool = False,
        class_probs: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> graph.StoppingIterator:
        """Endless batches from step `start_step` on; those of a step are the same wherever one starts.

        Args:
          start_step: the first step.
          batch_size: B, items of a step on all hosts together; this host gets its 1/process_count of them.
          split: the split to draw from.
          seed: of the order.
          selection: the records whose items are fed, by record id; None feeds all, with their labels. Of an
            unlabelled VCR record "qa" alone is fed, for "qar" would show its right answer.
          images: give image.
          clip: give clip_tokens, clip_token_mask, clip_word_ids, importance.
          class_probs: give class_probs.
          process_index: this host.
          process_count: hosts. They take consecutive parts of each step's batch.

        Raises:
          ValueError: an argument is out of range, a selected record is not in the split, or what is asked
            for was not prepared.
          KeyError: there is no such split.
        """
        check_sizes(batch_size, process_index, process_count)
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must not be negative")
        loaded, shapes = self.split(split), self.shapes(split)
        items, labelled = loaded.selected(selection)
        plan = QuestionPlan(
            shape_of(loaded.lengths, shapes),
            shapes,
            items=items,
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

        steps = range(start_step, sys.maxsize)
        return self._batches(steps, plan.rows, loaded, shapes, labelled, images, clip, class_probs, False)

    def eval_batches(
        self,
        split: str,
        *,
        batch_size: int,
        images: bool = False,
        clip: bool = False,
        class_probs: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> graph.StoppingIterator:
        """Every item once, with its label; arguments as in `batches`.

        Items come shape by shape, not in order: example_id says which they are. Only the last batch is filled
        with rows of mask False, label, example_id and image_id -1, which show an item of the batch again; all
        hosts get equally many batches.
        """
        check_sizes(batch_size, process_index, process_count)
        loaded, shapes = self.split(split), self.shapes(split)
        buckets = shape_of(loaded.lengths, shapes)
        kinds, mine = evaluation_rows(buckets, shapes, batch_size, process_index, process_count)

        def rows(step: int) -> tuple[int, np.ndarray]:
            return int(kinds[step]), mine[step]

        labelled = loaded.has_label()
        steps = range(len(mine))
        return self._batches(steps, rows, loaded, shapes, labelled, images, clip, class_probs, True)

    def image_batches(self, split: str, ids: Int[np.ndarray, "n b"]) -> graph.StoppingIterator:
        """Pictures by image_id: image, image_id, mask. An id of -1 gives a row of mask False."""
        check_ids("image", ids, len(self.split(split).image_names))
        read = partial(read_steps, records=self._records(split), num_threads=self._num_threads)
        return picture_batches(ids, partial(read, image_size=self._image_size))

    def text_batches(self, split: str, ids: Int[np.ndarray, "n b"]) -> Iterator[dict[str, np.ndarray]]:
        """What CLIP reads by example_id: clip_tokens, clip_token_mask, clip_word_ids, importance, label,
        example_id, mask. An id of -1 gives a row of mask False with the first item's texts."""
        loaded = self.split(split)
        check_ids("example", ids, len(loaded))
        for row in ids.astype(np.int64):
            mask = row >= 0
            yield {
                **loaded.text(np.maximum(row, 0), 0, student=False, clip=True),
                "label": masked_ids(loaded.label[np.maximum(row, 0)], mask),
                "example_id": masked_ids(row, mask),
                "mask": mask,
            }

    def _batches(
        self,
        steps: range,
        rows: StepRows,
        loaded: QuestionSplit,
        shapes: Sequence[Shape],
        labelled: np.ndarray,
        images: bool,
        clip: bool,
        class_probs: bool,
        official: bool,
    ) -> graph.StoppingIterator:
        if class_probs and not self.region_classes:
            raise ValueError(
                f"{self.directory}: the region features have no distributions over classes, or they were "
                "prepared without them (class_probs)"
            )
        if clip:  # an error at once, not in the first batch
            loaded.text(np.zeros(1, np.int64), 0, student=False, clip=True)
        read = partial(
            read_steps,
            records=self._records(loaded.name),
            width=int(self.manifest["region_width"]),
            image_size=self._image_size if images else 0,
            classes=self.region_classes if class_probs else 0,
            num_threads=self._num_threads,
        )
        answers = None if self.answers is None else len(self.answers)
        return question_batches(
            steps, rows, loaded, shapes, labelled, read, answers=answers, official=official, clip=clip
        )

    def _records(self, split: str) -> Any:
        if split not in self._opened:
            self._opened[split] = graph.open_records(self.directory, split, index.IMAGES)
        return self._opened[split]
