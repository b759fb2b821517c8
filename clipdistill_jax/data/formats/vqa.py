"""VQA v2 as it lies on disk: questions and annotations json, COCO images.

Files (visualqa.org):
  v2_OpenEnded_mscoco_{subset}_questions.json   {"questions": [{"image_id", "question", "question_id"}]}
  v2_mscoco_{subset}_annotations.json           {"annotations": [{"question_id", "answers": 10 x {"answer"}}]}
  {train2014,val2014,test2015}/COCO_{...}_{image_id:012}.jpg
with subset train2014, val2014, test2015 or test-dev2015; the test subsets have no annotations.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.listing import Listing, make_listing, whole_number

SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
IMAGE_FOLDERS = {"train2014": "train2014", "val2014": "val2014"} | dict.fromkeys(
    ("test2015", "test-dev2015"), "test2015"
)
NUM_ANSWERS = 10


@dataclasses.dataclass(frozen=True)
class VqaRecord:
    """One question.

    Attributes:
      example_id: "question_id" as text.
      image_id: COCO's number.
      image: its file.
      question: the text.
      answers: what ten people said, as they wrote it; empty in the test subsets.
      top_answer: "multiple_choice_answer", the most frequent one; None where the file has none.
      answer_type: "yes/no", "number" or "other"; None where the file has none.
      record: where it stands.
    """

    example_id: str
    image_id: int
    image: Path
    question: str
    answers: tuple[str, ...]
    top_answer: str | None
    answer_type: str | None
    record: str
    id_field: ClassVar[str] = "question_id"

    @property
    def files(self) -> dict[str, Path]:
        return {"image_id": self.image}


def read(
    source: str | os.PathLike[str],
    *,
    subsets: Mapping[str, str] = SUBSETS,
    allow_missing: bool = False,
) -> Listing[VqaRecord]:
    """Lists the questions of a VQA v2 tree; opens no image.

    Args:
      source: the folder that holds the files named above.
      subsets: split -> subset, which to read; each must be there.
      allow_missing: leave out (and list) questions whose image is missing.

    Raises:
      FileNotFoundError: a needed file is absent.
      FormatError: a record is damaged, or questions and annotations do not belong together.
      ValueError: a subset is unknown.
    """
    source = Path(source)
    unknown = sorted(set(subsets.values()) - IMAGE_FOLDERS.keys())
    if unknown:
        raise ValueError(f"subsets has {unknown}; it can have {sorted(IMAGE_FOLDERS)}")
    found, files = {}, []
    for split, subset in subsets.items():
        questions = source / f"v2_OpenEnded_mscoco_{subset}_questions.json"
        annotations = None
        if not subset.startswith("test"):
            annotations = source / f"v2_mscoco_{subset}_annotations.json"
        folder = IMAGE_FOLDERS[subset]
        found[split] = read_questions(questions, annotations, source / folder, f"COCO_{folder}")
        files += [questions] + ([annotations] if annotations else [])
    return make_listing(found, files, allow_missing=allow_missing)


def read_questions(
    questions: Path, annotations: Path | None, images: Path, prefix: str
) -> Iterator[VqaRecord]:
    """The records of one pair of files, their images being `images`/{prefix}_{image_id:012}.jpg.

    Raises:
      FileNotFoundError, FormatError: as `read`.
    """
    listed = checked.field(checked.read_json(questions), "questions", list, f"{questions}, top level")
    answered = _annotations(annotations) if annotations else {}
    seen: dict[str, str] = {}
    for k, data in enumerate(listed):
        where = f"{questions}, questions[{k}]"
        question_id = whole_number(data, "question_id", where)
        checked.check_unique(str(question_id), where, seen, "question_id")
        where += f", question_id {question_id}"
        image_id = whole_number(data, "image_id", where)
        question = " ".join(checked.field(data, "question", str, where).split())
        if not question:
            raise FormatError(f"{where}: the field 'question' is empty")
        note: dict[str, Any] = {}
        if annotations:
            if question_id not in answered:
                raise FormatError(f"{where}: {annotations} has no annotation of it")
            place, note = answered.pop(question_id)
            if note.get("image_id", image_id) != image_id:
                raise FormatError(
                    f"{place}: the field 'image_id' is {note['image_id']}, the question's is {image_id}"
                )
        yield VqaRecord(
            example_id=str(question_id),
            image_id=image_id,
            image=images / f"{prefix}_{image_id:012}.jpg",
            question=question,
            answers=note.get("answers", ()),
            top_answer=note.get("multiple_choice_answer"),
            answer_type=note.get("answer_type"),
            record=f"{questions.name}, questions[{k}]",
        )
    for place, _ in answered.values():
        raise FormatError(f"{place}: {questions} has no such question ({len(answered)} in all)")


def _annotations(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """question_id -> (where, annotation with its answers as texts)."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    notes = checked.field(checked.read_json(path), "annotations", list, f"{path}, top level")
    for k, note in enumerate(notes):
        where = f"{path}, annotations[{k}]"
        question_id = whole_number(note, "question_id", where)
        where += f", question_id {question_id}"
        if question_id in found:
            raise FormatError(f"{where}: the question_id was already in {found[question_id][0]}")
        answers = checked.field(note, "answers", list, where)
        if len(answers) != NUM_ANSWERS:
            raise FormatError(
                f"{where}: the field 'answers' has {len(answers)} answers, expected {NUM_ANSWERS}"
            )
        texts = tuple(
            checked.field(a, "answer", str, f"{where}, answers[{i}]") for i, a in enumerate(answers)
        )
        for name in ("multiple_choice_answer", "answer_type"):
            if name in note:
                checked.field(note, name, str, where)
        found[question_id] = (where, {**note, "answers": texts})
    return found
