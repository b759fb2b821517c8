"""Which boxes of which images get features, and into which of UNITER's files they go."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float32

from clipdistill_jax.data.formats import snli_ve, vcr, vqa
from clipdistill_jax.data.formats.clips import FormatError, Problem
from clipdistill_jax.data.formats.listing import Listing
from clipdistill_jax.data.regions.box_file import Boxes, BoxFile, fractions
from clipdistill_jax.data.regions.uniter import coco_name, flickr_name, vcr_names

METADATA = "metadata"
SPLITS = ("train", "validation", "test")
MAX_GRID = 10  # 100 boxes: readers of detections keep no more
# What PIL raises for a file that it cannot read.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True)
class ImageBoxes:
    """An image and the npz files made of it. record: where the image is named first."""

    image: Path
    split: str
    record: str
    files: tuple[Boxes, ...]


class Plan(NamedTuple):
    """What is to be done, and the images that are missing or not readable."""

    images: tuple[ImageBoxes, ...]
    problems: tuple[Problem, ...]


class _Named(NamedTuple):
    """An image of a dataset, its name in a box file and its npz; for VCR also the record, which has boxes."""

    split: str
    image: Path
    name: str
    file: str
    where: str
    record: vcr.VcrRecord | None = None


def plan_boxes(
    format: str,
    source: str | os.PathLike[str],
    boxes: str,
    *,
    classes: Sequence[str] = (),
    splits: Sequence[str] = SPLITS,
    allow_missing: bool = False,
) -> Plan:
    """Lists every image of a dataset once, with the boxes that features are wanted for.

    A VCR image gets a file of its annotated boxes (vcr_gt_...), which are those of its metadata, and one of
    its detections (vcr_...); images of SNLI-VE and VQA have detections only.

    Args:
      format: "vcr", "snli_ve" or "vqa".
      source: the folder of the raw tree, see the format's module.
      boxes: what the detections are. "metadata": none (VCR only). "grid:N": N x N equal tiles. Else a JSON
        file {image name: [[x1, y1, x2, y2, confidence, class], ...]} in pixels; confidence (1 where it is
        left out) and class may be left out. The name is the file's, for VCR the record's "img_fn". An image
        with an empty list gets one box, the whole of it.
      classes: names of the detector's classes; a class in the file is such a name or its index from 0. With
        them VCR's annotated boxes have classes too, and every object's name must be there.
      splits: which to read.
      allow_missing: leave out (and list) images that are missing; else that is an error.

    Raises:
      FileNotFoundError, FormatError: a file is absent or damaged; a box leaves its image; the box file names
        images that the splits do not have, or not all that they have.
      ValueError: `format`, `boxes` or `splits` is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if boxes == METADATA and format != "vcr":
        raise ValueError(f"{format} has no annotated boxes: give a box file, or grid:N")
    named, problems = FORMATS[format](Path(source), splits, allow_missing)
    grid = _grid(boxes)
    found = None if boxes == METADATA or grid is not None else BoxFile(Path(boxes), classes)
    if found is not None:
        found.check_names([image.name for image in named], others=bool(problems))  # the missing images' names
    planned, unreadable = [], []
    for image in named:
        files = [_annotated(image.record, image.split, classes)] if image.record else []
        try:
            if grid is not None:
                files.append(Boxes(image.file, grid, np.ones(len(grid), np.float32)))
            elif found is not None:
                files.append(found.boxes(image.name, image.file, _size(image.image)))
        except _Unreadable as error:
            unreadable.append(
                Problem("unreadable_image", image.split, str(image.image), image.where, str(error))
            )
            continue
        planned.append(ImageBoxes(image.image, image.split, image.where, tuple(files)))
    return Plan(tuple(planned), (*problems, *unreadable))


class _Unreadable(Exception):
    """An image's header cannot be read."""


def _size(image: Path) -> tuple[float, float]:
    try:
        with PIL.Image.open(image) as opened:
            return float(opened.width), float(opened.height)
    except UNREADABLE as error:
        raise _Unreadable(str(error)) from error


def _grid(boxes: str) -> Float32[np.ndarray, "n 4"] | None:
    """Tiles row by row; None where no grid is asked for."""
    if not boxes.startswith("grid:"):
        return None
    count = re.fullmatch(r"grid:(\d{1,4})", boxes)
    side = int(count[1]) if count else 0
    if not 1 <= side <= MAX_GRID:
        raise ValueError(f"boxes={boxes!r}: expected grid:N with N from 1 to {MAX_GRID}")
    y, x = (axis.reshape(-1) for axis in np.mgrid[:side, :side])
    return (np.stack([x, y, x + 1, y + 1], axis=1) / side).astype(np.float32)


def _unique(images: Iterator[_Named]) -> list[_Named]:
    """Each image once, in the order of the records; two images may not share an npz."""
    seen: dict[str, _Named] = {}
    for image in images:
        first = seen.setdefault(image.file, image)
        if first.image != image.image:
            raise FormatError(
                f"{image.where}: the image {image.image} would have the file {image.file} of {first.image}"
            )
    return list(seen.values())


_Listed = tuple[list[_Named], tuple[Problem, ...]]


def _vcr(source: Path, splits: Sequence[str], allow_missing: bool) -> _Listed:
    listing = vcr.read(source, splits=splits, allow_missing=allow_missing)

    def images() -> Iterator[_Named]:
        for split, record in _records(listing):
            name = record.image.relative_to(source / vcr.IMAGES).as_posix()
            file = vcr_names(split, record.image)[1]
            yield _Named(split, record.image, name, file, record.record, record)

    return _unique(images()), listing.problems


def _annotated(record: vcr.VcrRecord, split: str, classes: Sequence[str]) -> Boxes:
    """The boxes of a record's metadata; their class is the object's name."""
    corners, size = vcr.read_boxes(record)
    ids = None
    if classes:
        unknown = sorted(set(record.objects) - set(classes))
        if unknown:
            raise FormatError(
                f"{record.metadata} ({record.record}): the objects {unknown} are not in the list of classes"
            )
        ids = np.array([list(classes).index(name) for name in record.objects], np.int32)
    conf = np.ones(len(corners), np.float32)
    return Boxes(vcr_names(split, record.image)[0], fractions(corners, size), conf, ids)


def _snli_ve(source: Path, splits: Sequence[str], allow_missing: bool) -> _Listed:
    listing = snli_ve.read(source, splits=splits, allow_missing=allow_missing)

    def images() -> Iterator[_Named]:
        for split, record in _records(listing):
            number = record.image_id.isdecimal()  # as all of Flickr30k's are
            file = flickr_name(record.image_id) if number else f"{record.image_id}.npz"
            yield _Named(split, record.image, record.image.name, file, record.record)

    return _unique(images()), listing.problems


def _vqa(source: Path, splits: Sequence[str], allow_missing: bool) -> _Listed:
    unknown = sorted(set(splits) - vqa.SUBSETS.keys())
    if unknown:
        raise ValueError(f"splits has {unknown}; it can have {sorted(vqa.SUBSETS)}")
    subsets = {split: vqa.SUBSETS[split] for split in splits}
    listing = vqa.read(source, subsets=subsets, allow_missing=allow_missing)

    def images() -> Iterator[_Named]:
        for split, record in _records(listing):
            file = coco_name(vqa.IMAGE_FOLDERS[subsets[split]], record.image_id)
            yield _Named(split, record.image, record.image.name, file, record.record)

    return _unique(images()), listing.problems


def _records(listing: Listing[Any]) -> Iterator[tuple[str, Any]]:
    return ((split, record) for split, records in listing.splits.items() for record in records)


FORMATS: Mapping[str, Callable[[Path, Sequence[str], bool], _Listed]] = {
    "vcr": _vcr,
    "snli_ve": _snli_ve,
    "vqa": _vqa,
}
