"""Visual Commonsense Reasoning (VCR) as it lies on disk, and its object tags in words.

Files (rowanz/r2c dataloaders/vcr.py):
  train.jsonl, val.jsonl, test.jsonl   a question with four answers and four rationales a line
  vcr1images/{movie}/{name}.jpg        the image ("img_fn")
  vcr1images/{movie}/{name}.json       its boxes ("metadata_fn")

A text is a list of words and tags; a tag is a list of indices into `objects`, counted from 0. The record
keeps the tags, and `render` writes names in their place, so that each student can have its own.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.listing import (
    Listing,
    inside,
    is_index,
    is_number,
    make_listing,
    read_jsonl,
    whole_number,
)
from clipdistill_jax.data.regions import check_boxes

FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
IMAGES = "vcr1images"
PERSON = "person"
# VL-BERT vcr/data/datasets/vcr.py:21
NEUTRAL_NAMES = (
    *("Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton"),
    *("Kerry", "Jody", "Kendall", "Frankie", "Pat", "Quinn"),
)
UNITER_PERSONS = 81  # rows that UNITER adds to its word table for person_0 to person_80

Words = tuple[str | tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class VcrRecord:
    """One question.

    Attributes:
      example_id: "annot_id", e.g. "train-0".
      image, metadata: its files.
      objects: class name of each box; a tag is an index into them.
      question: words and tags.
      answers, rationales: four choices each.
      answer_label, rationale_label: index of the right choice; None in the test split.
      record: where it stands.
    """

    example_id: str
    image: Path
    metadata: Path
    objects: tuple[str, ...]
    question: Words
    answers: tuple[Words, ...]
    rationales: tuple[Words, ...]
    answer_label: int | None
    rationale_label: int | None
    record: str
    id_field: ClassVar[str] = "annot_id"

    @property
    def files(self) -> dict[str, Path]:
        return {"img_fn": self.image, "metadata_fn": self.metadata}


class VcrBoxes(NamedTuple):
    """The ground-truth boxes of an image: x1, y1, x2, y2 in pixels, and the image's width and height."""

    boxes: Float32[np.ndarray, "n 4"]
    size: tuple[float, float]


class Rendered(NamedTuple):
    """A text with names for tags; `objects[i]` is the object that word i names, -1 for other words."""

    words: tuple[str, ...]
    objects: tuple[int, ...]


def read(
    source: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    allow_missing: bool = False,
) -> Listing[VcrRecord]:
    """Lists the questions of a VCR tree; opens no image and no metadata.

    Args:
      source: the folder that holds the files named above.
      splits: which to read; each must be there.
      allow_missing: leave out (and list) questions whose image or metadata is missing.

    Raises:
      FileNotFoundError: a needed file is absent.
      FormatError: a record is damaged; names the file, the line and the field.
    """
    source = Path(source)
    unknown = sorted(set(splits) - FILES.keys())
    if unknown:
        raise ValueError(f"splits has {unknown}; it can have {sorted(FILES)}")
    files = {split: source / FILES[split] for split in splits}
    found = {
        split: read_questions(path, source / IMAGES, labels=split != "test") for split, path in files.items()
    }
    return make_listing(found, files.values(), allow_missing=allow_missing)


def read_questions(path: Path, images: Path, *, labels: bool) -> Iterator[VcrRecord]:
    """The records of one file in VCR's format.

    Args:
      path: the jsonl file.
      images: the folder that img_fn and metadata_fn start from.
      labels: both labels must be there; else they may be absent.

    Raises:
      FileNotFoundError, FormatError: as `read`.
    """
    for line, data in read_jsonl(path):
        where = f"{path}, line {line}"
        annot_id = checked.field(data, "annot_id", str, where)
        where += f", annot_id {annot_id!r}"
        objects = checked.field(data, "objects", list, where)
        if not objects or not all(isinstance(name, str) and name.strip() for name in objects):
            raise FormatError(f"{where}: the field 'objects' should list one class name a box")
        question = checked.field(data, "question", list, where)
        yield VcrRecord(
            example_id=annot_id,
            image=inside(images, checked.field(data, "img_fn", str, where), f"{where}, field 'img_fn'"),
            metadata=inside(
                images, checked.field(data, "metadata_fn", str, where), f"{where}, field 'metadata_fn'"
            ),
            objects=tuple(objects),
            question=_words(question, len(objects), f"{where}: the field 'question'"),
            answers=_choices(data, "answer_choices", len(objects), where),
            rationales=_choices(data, "rationale_choices", len(objects), where),
            answer_label=_label(data, "answer_label", labels, where),
            rationale_label=_label(data, "rationale_label", labels, where),
            record=f"{path.name}, line {line}",
        )


def read_boxes(record: VcrRecord) -> VcrBoxes:
    """Reads the metadata of a record's image.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is damaged, its names are not the record's objects, or a box leaves the image.
    """
    data = checked.read_json(record.metadata)
    where = f"{record.metadata} ({record.record})"
    names = checked.field(data, "names", list, where)
    if names != list(record.objects):
        raise FormatError(
            f"{where}: the field 'names' is {names}, but the record's 'objects' are {list(record.objects)}"
        )
    width, height = (whole_number(data, name, where) for name in ("width", "height"))
    boxes = checked.field(data, "boxes", list, where)
    rows = [row for row in boxes if isinstance(row, list) and len(row) == 5]
    if len(rows) != len(names) or len(boxes) != len(names):
        raise FormatError(
            f"{where}: the field 'boxes' should have {len(names)} rows x1, y1, x2, y2, score, one a name"
        )
    for k, row in enumerate(rows):
        if not all(map(is_number, row)):
            raise FormatError(f"{where}: the field 'boxes' should hold numbers, but row {k} is {row!r:.80}")
    values = np.array(rows, np.float32)[:, :4]
    size = (float(width), float(height))
    check_boxes(values, size, where)
    return VcrBoxes(values, size)


def render(text: Words, names: Sequence[str], *, joiner: str = "") -> Rendered:
    """Writes a name for each tag.

    Args:
      text: words and tags.
      names: one name an object: `record.objects` (class names), `uniter_names` or `neutral_names`.
      joiner: word put between the names of a tag of several objects: VL-BERT has "and", UNITER nothing.
    """
    words: list[str] = []
    objects: list[int] = []
    for item in text:
        if isinstance(item, str):
            words.append(item)
            objects.append(-1)
            continue
        for k, index in enumerate(item):
            if k and joiner:
                words.append(joiner)
                objects.append(-1)
            words.append(names[index])
            objects.append(index)
    return Rendered(tuple(words), tuple(objects))


def uniter_names(objects: Sequence[str]) -> tuple[str, ...]:
    """UNITER's names: "person_{i}" for a person, i counting all objects; the class name for the rest.

    UNITER has 81 such tokens; a person beyond object 80 is plain "person" (ours: its code for this was never
    released).
    """
    return tuple(
        f"person_{i}" if name == PERSON and i < UNITER_PERSONS else name for i, name in enumerate(objects)
    )


def neutral_names(record: VcrRecord) -> tuple[str, ...]:
    """VL-BERT's gender-neutral names for persons; the class name for the rest.

    VL-BERT deals the 13 names by a counter that runs over the examples as they are loaded, so that names
    change from run to run. Here the start is a hash of the example's id, and the persons that its texts speak
    of come first: up to 13 of them have different names, whatever the order of the records.
    """
    texts = (record.question, *record.answers, *record.rationales)
    spoken_of = {index for text in texts for item in text if not isinstance(item, str) for index in item}
    persons = [i for i, name in enumerate(record.objects) if name == PERSON]
    persons.sort(key=lambda i: (i not in spoken_of, i))
    start = int.from_bytes(hashlib.sha256(record.example_id.encode()).digest()[:4], "big")
    names = list(record.objects)
    for k, i in enumerate(persons):
        names[i] = NEUTRAL_NAMES[(start + k) % len(NEUTRAL_NAMES)]
    return tuple(names)


def _words(items: Any, num_objects: int, where: str) -> Words:
    if not isinstance(items, list):
        raise FormatError(f"{where} should be a list of words and tags, found {type(items).__name__}")
    words: list[str | tuple[int, ...]] = []
    for k, item in enumerate(items):
        if isinstance(item, str):
            if item.strip():  # a blank word says nothing
                words.append(item.strip())
        elif isinstance(item, list) and item and all(isinstance(i, int) for i in item):
            wrong = [i for i in item if not is_index(i, num_objects)]
            if wrong:
                raise FormatError(
                    f"{where}, item {k}: the tag {wrong[0]} is out of range; the record has {num_objects} "
                    f"objects, 0 to {num_objects - 1}"
                )
            words.append(tuple(item))
        else:
            raise FormatError(f"{where}, item {k}: neither a word nor a list of object indices: {item!r:.60}")
    if not words:
        raise FormatError(f"{where} is empty")
    return tuple(words)


def _choices(data: dict[str, Any], name: str, num_objects: int, where: str) -> tuple[Words, ...]:
    choices = checked.field(data, name, list, where)
    if len(choices) != 4:
        raise FormatError(f"{where}: the field {name!r} has {len(choices)} choices, expected 4")
    return tuple(_words(c, num_objects, f"{where}: the field '{name}[{k}]'") for k, c in enumerate(choices))


def _label(data: dict[str, Any], name: str, needed: bool, where: str) -> int | None:
    if not needed and data.get(name) is None:
        return None
    label = checked.field(data, name, int, where)
    if not is_index(label, 4):
        raise FormatError(f"{where}: the field {name!r} has the unknown label {label!r}, expected 0 to 3")
    return label
