"""SNLI-VE (visual entailment) as it lies on disk.

Files (necla-ml/SNLI-VE):
  snli_ve_train.jsonl, _dev.jsonl, _test.jsonl   a hypothesis about a Flickr30k image a line
  flickr30k_images/{id}.jpg                      also flickr30k-images/

The premise is the image alone: SNLI's own premise, "sentence1", is not read.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.listing import Listing, make_listing, read_jsonl

FILES = {"train": "snli_ve_train.jsonl", "validation": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}
IMAGE_FOLDERS = ("flickr30k_images", "flickr30k-images")
# The released files, the generator of today and the README each spell it their own way.
IMAGE_FIELDS = ("Flikr30kID", "Flickr30K_ID", "Flickr30kID")
LABELS = ("contradiction", "entailment", "neutral")  # UNITER utils/misc.py:39-49


@dataclasses.dataclass(frozen=True)
class SnliVeRecord:
    """One image-hypothesis pair.

    Attributes:
      example_id: "pairID", e.g. "1974336555.jpg#0r1c".
      image_id: Flickr30k's id, without ".jpg".
      image: its file.
      hypothesis: "sentence2".
      label: index into LABELS.
      image_field: the spelling that the file uses.
      record: where it stands.
    """

    example_id: str
    image_id: str
    image: Path
    hypothesis: str
    label: int
    image_field: str
    record: str
    id_field: ClassVar[str] = "pairID"

    @property
    def files(self) -> dict[str, Path]:
        return {self.image_field: self.image}


def read(
    source: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    allow_missing: bool = False,
) -> Listing[SnliVeRecord]:
    """Lists the pairs of an SNLI-VE tree; opens no image.

    Args:
      source: the folder that holds the files named above.
      splits: which to read; each must be there.
      allow_missing: leave out (and list) pairs whose image is missing.

    Raises:
      FileNotFoundError: a needed file or the folder of images is absent.
      FormatError: a record is damaged; names the file, the line and the field.
    """
    source = Path(source)
    unknown = sorted(set(splits) - FILES.keys())
    if unknown:
        raise ValueError(f"splits has {unknown}; it can have {sorted(FILES)}")
    images = next((source / name for name in IMAGE_FOLDERS if (source / name).is_dir()), None)
    if images is None:
        raise FileNotFoundError(f"{source}: no images; expected the folder {' or '.join(IMAGE_FOLDERS)}")
    files = {split: source / FILES[split] for split in splits}
    found = {split: read_pairs(path, images) for split, path in files.items()}
    return make_listing(found, files.values(), allow_missing=allow_missing)


def read_pairs(path: Path, images: Path) -> Iterator[SnliVeRecord]:
    """The records of one file, their images being `images`/{id}.jpg.

    Raises:
      FileNotFoundError, FormatError: as `read`.
    """
    for line, data in read_jsonl(path):
        where = f"{path}, line {line}"
        pair_id = checked.field(data, "pairID", str, where)
        where += f", pairID {pair_id!r}"
        field, image_id = _image(data, where)
        label = checked.field(data, "gold_label", str, where)
        if label not in LABELS:
            raise FormatError(
                f"{where}: the field 'gold_label' has the unknown label {label!r}; expected "
                f"{', '.join(LABELS)}"
            )
        hypothesis = " ".join(checked.field(data, "sentence2", str, where).split())
        if not hypothesis:
            raise FormatError(f"{where}: the field 'sentence2' is empty")
        yield SnliVeRecord(
            example_id=pair_id,
            image_id=image_id,
            image=images / f"{image_id}.jpg",
            hypothesis=hypothesis,
            label=LABELS.index(label),
            image_field=field,
            record=f"{path.name}, line {line}",
        )


def _image(data: dict[str, Any], where: str) -> tuple[str, str]:
    """(the spelling found, the image's id)."""
    found = {field: data[field] for field in IMAGE_FIELDS if field in data}
    if not found:
        raise FormatError(
            f"{where}: the field of the image is missing, one of {', '.join(IMAGE_FIELDS)}; it has "
            f"{sorted(data)}"
        )
    ids = {field: checked.field(data, field, str, where).removesuffix(".jpg") for field in found}
    field, image_id = next(iter(ids.items()))
    if len(set(ids.values())) > 1:
        raise FormatError(f"{where}: the fields {ids} name different images")
    checked.check_file_stem(image_id, f"{where}, field {field!r}")
    return field, image_id
