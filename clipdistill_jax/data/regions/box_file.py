"""A user's own detections: a JSON file of boxes by image."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.listing import is_index, is_number
from clipdistill_jax.data.regions import check_boxes


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of one npz.

    Attributes:
      file: its name.
      corners: [n, 4] x1, y1, x2, y2 as fractions of the image, within 0 and 1; n at least 1.
      conf: [n] confidences, 0 to 1.
      class_ids: [n] classes from 0, where they are known.
    """

    file: str
    corners: Float32[np.ndarray, "n 4"]
    conf: Float32[np.ndarray, " n"]
    class_ids: Int32[np.ndarray, " n"] | None = None


class BoxFile:
    """A user's detections, checked against the images they are of."""

    def __init__(self, path: Path, classes: Sequence[str]):
        """Reads it: {image name: [[x1, y1, x2, y2, confidence, class], ...]} in pixels.

        Args:
          path: a JSON file. Confidence and class may be left out; a class is a name or its index.
          classes: their names; empty: the boxes have none.

        Raises:
          FileNotFoundError, FormatError: the file is absent or no such object, or an image occurs twice.
        """
        self._path = path
        self._ids = {name: k for k, name in enumerate(classes)}
        self._rows = checked.read_json(path, unique=True)
        if not isinstance(self._rows, dict):
            raise FormatError(f"{path}: expected an object {{image name: [boxes]}}")

    def check_names(self, names: Sequence[str], *, others: bool) -> None:
        """Checks that the file speaks of the images, each of them.

        Args:
          names: of the images.
          others: it may have other names too.

        Raises:
          FormatError: it has other names, or lacks some.
        """
        known = set(names)
        unknown = [name for name in self._rows if name not in known]
        if unknown and not others:
            raise FormatError(
                f"{self._path}: {len(unknown)} of its {len(self._rows)} names are no images of these splits, "
                f"the first {unknown[0]!r}; a name looks like {names[0]!r}"
            )
        absent = [name for name in names if name not in self._rows]
        if absent:
            raise FormatError(
                f"{self._path}: no boxes of {len(absent)} of {len(names)} images, the first {absent[0]!r}; "
                "an image without detections should have an empty list"
            )

    def boxes(self, name: str, file: str, size: tuple[float, float]) -> Boxes:
        """The boxes of an image of (width, height) `size`, for the npz `file`, the most confident first.

        Where there is none it is the whole image.

        Raises:
          FormatError: a row is damaged, or its box leaves the image; names the image and the box.
        """
        where = f"{self._path}, image {name!r}"
        rows = self._rows[name]
        if not isinstance(rows, list):
            raise FormatError(f"{where}: expected a list of boxes, found {type(rows).__name__}")
        if not rows:
            ids = np.array([-1], np.int32) if self._ids else None
            return Boxes(file, np.array([[0, 0, 1, 1]], np.float32), np.ones(1, np.float32), ids)
        for k, row in enumerate(rows):
            if not (isinstance(row, list) and 4 <= len(row) <= 6 and all(map(is_number, row[:5]))):
                raise FormatError(
                    f"{where}, box {k}: expected x1, y1, x2, y2, confidence, class; {row!r:.80}"
                )
            if len(row) > 4 and not 0 <= row[4] <= 1:
                raise FormatError(f"{where}, box {k}: the confidence {row[4]} is not within 0 and 1")
        corners = np.array([row[:4] for row in rows], np.float32)
        check_boxes(corners, size, where)
        conf = np.array([row[4] if len(row) > 4 else 1 for row in rows], np.float32)
        ids = self._class_ids(rows, where)
        best_first = np.argsort(-conf, kind="stable")  # as UNITER's files are: readers cut such a list short
        return Boxes(
            file,
            fractions(corners, size)[best_first],
            conf[best_first],
            None if ids is None else ids[best_first],
        )

    def _class_ids(self, rows: list[list[Any]], where: str) -> Int32[np.ndarray, " n"] | None:
        with_class = [len(row) > 5 for row in rows]
        if not self._ids:
            if any(with_class):
                raise FormatError(f"{where}: its boxes have classes; give the list of the classes' names too")
            return None
        if not all(with_class):
            raise FormatError(
                f"{where}, box {with_class.index(False)}: no class, but a list of classes is given"
            )
        ids = [self._ids.get(row[5], -1) if isinstance(row[5], str) else row[5] for row in rows]
        for k, value in enumerate(ids):
            if not is_index(value, len(self._ids)):
                raise FormatError(
                    f"{where}, box {k}: the class {rows[k][5]!r} is none of the {len(self._ids)}"
                )
        return np.array(ids, np.int32)


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of classes, one a line, the background left out.

    Raises:
      FileNotFoundError, FormatError: the file is absent or empty, or a name occurs twice.
    """
    seen: dict[str, str] = {}
    for line, text in checked.read_lines(Path(path)):
        checked.check_unique(text.strip(), f"{path}, line {line}", seen, "class")
    return tuple(seen)


def fractions(corners: Float32[np.ndarray, "n 4"], size: tuple[float, float]) -> Float32[np.ndarray, "n 4"]:
    """Corners as fractions of the image; what a box sticks out, little once it is checked, is cut off."""
    return np.clip(corners / np.array([*size, *size], np.float32), 0, 1)
