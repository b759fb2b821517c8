"""From an image's files, its picture and its regions, to the record that is stored."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipdistill_jax.data.formats import vcr
from clipdistill_jax.data.formats.clips import FormatError, Problem
from clipdistill_jax.data.questions.sources import Record, RegionSource, read_regions, region_names
from clipdistill_jax.data.regions import MissingRegions
from clipdistill_jax.data.video import VideoOptions, stored_jpeg


class Stored(NamedTuple):
    """The record of an image, its regions, and K of their distributions over classes, 0 for none."""

    record: dict[str, bytes]
    regions: int
    classes: int


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """An image to be stored: the records that ask about it, and the names of its regions."""

    split: str
    records: tuple[Record, ...]
    annotated: tuple[str, ...]
    detected: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.records[0].image

    @property
    def where(self) -> str:
        """The first record that asks about it, for errors."""
        record = self.records[0]
        field = next(name for name, path in record.files.items() if path == record.image)
        return f"{record.record}, id {record.example_id!r}, field {field!r}: {record.image}"

    def problem(self, kind: str, reason: str) -> Problem:
        """Why it is left out."""
        record = self.records[0]
        file, _, place = record.record.partition(", ")
        return Problem(kind, self.split, file, f"{place}, id {record.example_id!r}", reason)


def images_of(records: Sequence[Record], split: str, regions: RegionSource) -> list[ImageFiles]:
    """The different images of a split, in the order in which the records name them.

    Raises:
      FormatError: two have the same regions; in VCR, frames of one name in two movies.
    """
    by_path: dict[Path, list[Record]] = {}
    for record in records:
        by_path.setdefault(record.image, []).append(record)
    images = [
        ImageFiles(split, tuple(found), *region_names(found[0], split, regions.format))
        for found in by_path.values()
    ]
    seen: dict[str, ImageFiles] = {}
    for image in images:
        first = seen.setdefault(image.detected[0], image)
        if first is not image:
            raise FormatError(f"{image.where} would have the regions {image.detected[0]} of {first.path}")
    return images


class ImageReader:
    """Makes records of images; used by many threads at once.

    Attributes:
      object_classes: names of the objects' classes, background first, then by the alphabet; empty where the
        dataset has no objects.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[ImageFiles]],
        regions: RegionSource,
        *,
        pictures: VideoOptions,
        max_regions: int,
        class_probs: bool,
        allow_missing: bool,
    ) -> None:
        """Looks over all images, by split; the rest as in `prepare_questions`."""
        self._regions, self._pictures, self._max_regions = regions, pictures, max_regions
        self._class_probs, self._allow_missing = class_probs, allow_missing
        every: Iterable[ImageFiles] = list(itertools.chain.from_iterable(images.values()))
        for image in every:
            regions.first_of(image.annotated)  # an error now where two folders have it
        # Where some VCR image has detections all must have them, or some would do without by mistake.
        found = [regions.first_of(image.detected) for image in every]
        self._need_detected = any(found)
        names = {name for image in every for name in _objects(image)}
        if names and not self._need_detected:
            logging.warning(
                "none of %d images has detected regions in %s: students see the annotated ones alone",
                len(found),
                regions.path,
            )
        self.object_classes = ("__background__", *sorted(names)) if names else ()
        self._class_of = {name: k for k, name in enumerate(self.object_classes)}

    def read(self, image: ImageFiles) -> Stored | Problem:
        """An image as it is stored, or why it is left out.

        Raises:
          FormatError: a file is damaged, or something is missing and that is not allowed.
        """
        from clipdistill_jax.data.questions.records import image_record  # imports TFDS

        objects = _objects(image)
        for record in image.records:
            if isinstance(record, vcr.VcrRecord):
                vcr.read_boxes(record)  # the objects are named in the order of the boxes
        try:
            with Image.open(image.path) as file:
                jpeg = stored_jpeg(file.convert("RGB"), self._pictures)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = f"{image.where}: the picture cannot be read: {error}"
            return self._left_out(image, "unreadable_image", reason)
        try:
            regions = read_regions(
                self._regions,
                image.annotated,
                image.detected,
                num_objects=len(objects),
                max_regions=self._max_regions,
                need_detected=self._need_detected,
                where=image.where,
            )
        except MissingRegions as error:
            return self._left_out(image, "missing_regions", str(error))
        except FormatError as error:
            if image.where in str(error):
                raise
            raise FormatError(f"{error} (regions of {image.where})") from error
        classes = np.full(len(regions), -1, np.int32)
        classes[1 : 1 + len(objects)] = [self._class_of[name] for name in objects]
        probs = regions.class_probs if self._class_probs else None
        record_of_image = image_record(
            jpeg, regions, classes, class_probs=probs is not None, where=image.where
        )
        return Stored(record_of_image, len(regions), 0 if probs is None else probs.shape[1])

    def _left_out(self, image: ImageFiles, kind: str, reason: str) -> Problem:
        if not self._allow_missing:
            raise FormatError(f"{reason}; put it right, or allow missing ones to leave such questions out")
        return image.problem(kind, reason)


def _objects(image: ImageFiles) -> tuple[str, ...]:
    record = image.records[0]
    return record.objects if isinstance(record, vcr.VcrRecord) else ()
