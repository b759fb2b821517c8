"""Region features as VL-BERT keeps them: {image_id}.json with arrays in base64 (vqa/data/datasets/vqa.py)."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.listing import whole_number
from clipdistill_jax.data.regions import MissingRegions, Regions, make_regions
from clipdistill_jax.data.regions.encoded import decode

WIDTH = 2048


def read_json(path: str | os.PathLike[str], *, width: int | None = WIDTH) -> Regions:
    """The regions of one image, with the whole image's features where the file has "image_box_feature".

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is damaged, lacks a field, or has another width.
    """
    path = Path(path)
    data = checked.read_json(path)
    image_w, image_h, count = (
        whole_number(data, name, str(path)) for name in ("image_w", "image_h", "num_boxes")
    )
    if str(data.get("image_id", path.stem)) != path.stem:
        raise FormatError(f"{path}: the field 'image_id' is {data['image_id']!r}, another image's")
    features, boxes = (
        decode(checked.field(data, name, str, str(path)), count, f"{path}, field {name!r}")
        for name in ("features", "boxes")
    )
    image = data.get("image_box_feature")
    if image is not None:
        image = decode(image, 1, f"{path}, field 'image_box_feature'")[0]
    return make_regions(
        features, boxes, (float(image_w), float(image_h)), str(path), width=width, image=image
    )


class VlBertFolder(Mapping[str, Regions]):
    """A folder of such files; keys are image ids, as text."""

    def __init__(self, folder: str | os.PathLike[str], *, width: int | None = WIDTH):
        self._folder, self._width = Path(folder), width
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of json files")
        self._ids = sorted(e.name[:-5] for e in os.scandir(folder) if e.name.endswith(".json"))
        self._known = frozenset(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._known

    def __getitem__(self, image_id: str) -> Regions:
        if image_id not in self._known:
            raise MissingRegions(f"{self._folder} has no {image_id}.json")
        return read_json(self._folder / f"{image_id}.json", width=self._width)
