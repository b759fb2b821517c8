"""Region features as bottom-up attention's TSV holds them: an image a line, no header, arrays in base64.

Two orders of columns go about, told apart by their number (width and height are swapped between them):
  6   image_id, image_w, image_h, num_boxes, boxes, features            (peteanderson80/bottom-up-attention)
  10  img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes, features
                                                                         (airsplay/lxmert src/utils.py:12-47)
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.regions import MissingRegions, Regions, make_regions
from clipdistill_jax.data.regions.encoded import decode

WIDTH = 2048
COLUMNS = {
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        *("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
        *("num_boxes", "boxes", "features"),
    ),
}


class BottomUpTsv(Mapping[str, Regions]):
    """A TSV file; keys are its image ids as they stand. Holds the offsets of the lines, not the lines."""

    def __init__(self, path: str | os.PathLike[str], *, width: int | None = WIDTH):
        """Reads through the file once for its ids.

        Raises:
          FileNotFoundError: it is absent.
          FormatError: a line has another number of columns, or an id occurs twice.
        """
        self._path, self._width = Path(path), width
        if not self._path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        self._places: dict[str, tuple[int, int]] = {}  # id -> (offset, line)
        offset = columns = 0
        with self._path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    where = f"{path}, line {line}"
                    found = raw.count(b"\t") + 1
                    columns = columns or found
                    if found not in COLUMNS or found != columns:
                        expected = columns if columns in COLUMNS else "6 or 10"
                        raise FormatError(f"{where}: {found} columns, expected {expected}; cut short?")
                    name = raw.partition(b"\t")[0].decode("utf-8", "replace").strip()
                    if name in self._places:
                        raise FormatError(
                            f"{where}: the id {name!r} was already in line {self._places[name][1]}"
                        )
                    self._places[name] = (offset, line)
                offset += len(raw)
        if not self._places:
            raise FormatError(f"{path}: the file is empty")
        self._columns = COLUMNS[columns]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Regions:
        if name not in self._places:
            raise MissingRegions(f"{self._path} has no image {name!r}")
        offset, line = self._places[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            raw = file.readline().rstrip(b"\r\n")
        where = f"{self._path}, line {line}, image {name!r}"
        return self._regions(dict(zip(self._columns, raw.split(b"\t"), strict=True)), where)

    def _regions(self, row: dict[str, bytes], where: str) -> Regions:
        try:
            width, height = float(row["image_w"]), float(row["image_h"])
            count = int(row["num_boxes"])
        except ValueError as error:
            raise FormatError(
                f"{where}: image_w, image_h and num_boxes should be numbers: {error}"
            ) from error
        extra = {}
        if "objects_id" in row:
            extra["class_ids"] = decode(row["objects_id"], count, f"{where}, 'objects_id'", dtype="<i8")
            extra["conf"] = decode(row["objects_conf"], count, f"{where}, 'objects_conf'")
        return make_regions(
            decode(row["features"], count, f"{where}, 'features'"),
            decode(row["boxes"], count, f"{where}, 'boxes'"),
            (width, height),
            where,
            width=self._width,
            **extra,
        )
