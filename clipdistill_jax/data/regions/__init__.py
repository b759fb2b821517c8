"""Region features of an image, one record for every file format."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from clipdistill_jax.data.formats.clips import FormatError

_SLACK = 0.01  # of a side: half-precision fractions and off-by-one corners
_ROWS = ("features", "boxes", "ground_truth", "conf", "class_ids", "class_probs")


class MissingRegions(FormatError, KeyError):
    """A file or database of region features has no such image."""

    __str__ = Exception.__str__  # KeyError's would quote the message


@dataclasses.dataclass(frozen=True)
class Regions:
    """The regions of one image: N of them, C features each.

    Attributes:
      features: [N, C].
      boxes: [N, 4] x1, y1, x2, y2 in the frame of `size`.
      size: (width, height) of that frame: pixels, or (1, 1) where the file holds fractions alone.
      ground_truth: [N] bool; True for an annotated box, which come first, False for a detected one.
      conf: [N] the detector's confidence.
      class_ids: [N] the detector's class, from 0 without a background class; -1 for none.
      class_probs: [N, K] its distribution over classes, background first.
      image: [C] features of the whole image, where the file has them.
    """

    features: Float32[np.ndarray, "n c"]
    boxes: Float32[np.ndarray, "n 4"]
    size: tuple[float, float]
    ground_truth: Bool[np.ndarray, " n"]
    conf: Float32[np.ndarray, " n"] | None = None
    class_ids: Int32[np.ndarray, " n"] | None = None
    class_probs: Float32[np.ndarray, "n k"] | None = None
    image: Float32[np.ndarray, " c"] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: Any) -> "Regions":
        """The rows of a NumPy index, in its order."""
        rows = {name: getattr(self, name) for name in _ROWS}
        taken: dict[str, Any] = {name: v[index] for name, v in rows.items() if v is not None}
        return dataclasses.replace(self, **taken)

    def scaled(self, size: tuple[float, float]) -> "Regions":
        """The same boxes in another frame."""
        factor = np.array([size[0] / self.size[0], size[1] / self.size[1]] * 2, np.float32)
        return dataclasses.replace(self, boxes=self.boxes * factor, size=(float(size[0]), float(size[1])))


def make_regions(
    features: Any,
    boxes: Any,
    size: tuple[float, float],
    where: str,
    *,
    width: int | None,
    conf: Any = None,
    class_ids: Any = None,
    class_probs: Any = None,
    image: Any = None,
) -> Regions:
    """Checks arrays read from a file and makes detected regions of them, in float32.

    Args:
      features, boxes, size, conf, class_ids, class_probs, image: as in `Regions`.
      where: names the file and the record in errors.
      width: the C that the model takes; None takes any.

    Raises:
      FormatError: a shape is wrong, a value is not finite, or a box leaves the frame.
    """
    features = np.asarray(features)
    if features.ndim != 2 or not len(features):
        raise FormatError(f"{where}: 'features' should be [regions, width], found {list(features.shape)}")
    count, found = features.shape
    if width is not None and found != width:
        raise FormatError(
            f"{where}: 'features' is {found} wide, the model takes {width}; use features of the extractor "
            "that the model was trained with, or give the model this width"
        )
    boxes = np.asarray(boxes, np.float32)
    if boxes.shape != (count, 4):
        raise FormatError(f"{where}: 'boxes' should be [{count}, 4], found {list(boxes.shape)}")
    check_boxes(boxes, size, where)
    optional: dict[str, Any] = {}
    for name, value, shape, dtype in (
        ("conf", conf, (count,), np.float32),
        ("class_ids", class_ids, (count,), np.int32),
        ("class_probs", class_probs, (count, -1), np.float32),
        ("image", image, (found,), np.float32),
    ):
        try:
            optional[name] = None if value is None else np.asarray(value).reshape(shape).astype(dtype)
        except ValueError as error:
            shown = list(np.shape(value))
            raise FormatError(f"{where}: {name!r} should be {list(shape)}, found {shown}") from error
    for name, value in {"features": features, **optional}.items():
        if value is not None and not np.isfinite(value).all():
            raise FormatError(f"{where}: {name!r} holds a value that is not finite")
    return Regions(
        features=features.astype(np.float32),
        boxes=boxes,
        size=(float(size[0]), float(size[1])),
        ground_truth=np.zeros(count, bool),
        **optional,
    )


def check_boxes(boxes: Float32[np.ndarray, "n 4"], size: tuple[float, float], where: str) -> None:
    """Refuses boxes that are not x1, y1, x2, y2 within the frame; 1% of a side is forgiven.

    Raises:
      FormatError: names the first bad box.
    """
    width, height = size
    if not (np.isfinite([width, height]).all() and width > 0 and height > 0):
        raise FormatError(f"{where}: the size {width} x {height} is no image's")
    x1, y1, x2, y2 = boxes.T
    ordered = (x1 <= x2) & (y1 <= y2)  # false for NaN too
    low = (x1 >= -_SLACK * width) & (y1 >= -_SLACK * height)
    high = (x2 <= (1 + _SLACK) * width) & (y2 <= (1 + _SLACK) * height)
    bad = np.flatnonzero(~(ordered & low & high))
    if not len(bad):
        return
    k = int(bad[0])
    shown = ", ".join(f"{v:g}" for v in boxes[k])
    if not ordered[k]:
        raise FormatError(f"{where}: box {k} ({shown}) is not x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    raise FormatError(
        f"{where}: box {k} ({shown}) leaves the image of {width:g} x {height:g}; are width and height "
        "swapped, or the boxes those of a resized image?"
    )


def join(ground_truth: Regions, detected: Regions, where: str, *, num_objects: int | None = None) -> Regions:
    """Annotated regions, then detected ones, so that object tag i is region i (UNITER train_vcr.py:95-113).

    Args:
      ground_truth, detected: of one image, with features of one width.
      where: names the image in errors.
      num_objects: how many annotated regions there must be.

    Returns:
      Both; conf, class_ids and class_probs only where both have them.

    Raises:
      FormatError: sizes, widths or the number of annotated regions do not agree.
    """
    if num_objects is not None and len(ground_truth) != num_objects:
        raise FormatError(f"{where}: {len(ground_truth)} ground-truth regions, but {num_objects} objects")
    if ground_truth.size != detected.size:
        raise FormatError(
            f"{where}: ground truth in a frame of {ground_truth.size}, detections in one of {detected.size}; "
            "bring them to one with `scaled`"
        )
    both: dict[str, Any] = {}
    for name in _ROWS:
        parts = [getattr(ground_truth, name), getattr(detected, name)]
        if any(part is None for part in parts):
            both[name] = None
        elif parts[0].shape[1:] != parts[1].shape[1:]:
            raise FormatError(
                f"{where}: {name!r} is {parts[0].shape[1]} wide in the ground truth, {parts[1].shape[1]} "
                "in the detections"
            )
        else:
            both[name] = np.concatenate(parts)
    both["ground_truth"] = np.arange(len(ground_truth) + len(detected)) < len(ground_truth)
    image = detected.image if detected.image is not None else ground_truth.image
    return Regions(size=detected.size, image=image, **both)


def most_confident(
    regions: Regions, *, threshold: float = 0.2, min_count: int = 10, max_count: int = 100
) -> Regions:
    """The detections above a confidence, but at least min_count and at most max_count, best first.

    UNITER data/data.py:41-45 with its defaults; it takes the first rows as they lie, which is the same where
    the file has the best first.

    Raises:
      ValueError: the regions have no confidences.
    """
    if regions.conf is None:
        raise ValueError("regions without confidences cannot be chosen by confidence")
    kept = min(max(int((regions.conf > threshold).sum()), min_count), max_count)
    return regions.take(np.argsort(-regions.conf, kind="stable")[:kept])


def prepend_image(regions: Regions) -> Regions:
    """Puts the whole image before all regions: object tag i is then region i + 1.

    Its features are those of the file, else the mean of the regions' (VL-BERT vqa/data/datasets/vqa.py).

    Returns:
      N + 1 regions. The first is no ground truth and has confidence 1, class -1 and a class_probs row of 0.
    """
    image = regions.image if regions.image is not None else regions.features.mean(0)
    width, height = regions.size
    first: dict[str, Any] = {
        "features": image,
        "boxes": (0, 0, width, height),
        "ground_truth": False,
        "conf": 1,
        "class_ids": -1,
        "class_probs": 0,
    }
    rows: dict[str, Any] = {}
    for name in _ROWS:
        value = getattr(regions, name)
        if value is not None:
            row = np.broadcast_to(np.asarray(first[name], value.dtype), value[:1].shape)
            rows[name] = np.concatenate([row, value])
    return dataclasses.replace(regions, **rows)
