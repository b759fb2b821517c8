"""Computes features of boxes and writes them as UNITER's npz files, for NpzFolder to read.

A file has norm_bb, features, conf and, where classes are known, soft_labels, as `data.regions.uniter`
describes them, and besides `image` [C], the features of the whole image, which UNITER passes over.
"""

import dataclasses
import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import Problem
from clipdistill_jax.data.index import write_json
from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.regions.box_file import Boxes
from clipdistill_jax.data.regions.boxes import UNREADABLE, ImageBoxes, Plan
from clipdistill_jax.data.regions.uniter import NPZ_DAMAGE
from clipdistill_jax.models.regions import RegionTower, region_features

MANIFEST = "regions.json"
_PARTIAL = ".partial"
_MIN_BOXES = 16
_WHOLE = np.array([[0, 0, 1, 1]], np.float32)


class Loaded(NamedTuple):
    """An image made square: its pixels, and the (width, height) of them that the picture fills."""

    pixels: UInt8[np.ndarray, "s s 3"]
    extent: tuple[int, int]


def extract_regions(
    plan: Plan,
    tower: RegionTower,
    out: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    num_classes: int = 0,
    batch_size: int = 16,
    workers: int = 4,
    max_unreadable: float | int = 0.05,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes every npz of a plan that `out` does not hold yet, then regions.json.

    Files appear whole or not at all, so a stopped run goes on where it was. A file of other boxes, or a
    damaged one, is written again. A batch has `batch_size` images and a power of two of boxes, so that few
    shapes are compiled.

    Args:
      plan: from `plan_boxes`.
      tower: computes the features.
      out: the folder, which exists.
      options: what decides the numbers (JSON values); a folder of other options is refused.
      num_classes: how many there are where boxes have classes; soft_labels have one more column.
      batch_size: images computed at a time.
      workers: threads that decode images.
      max_unreadable: largest fraction of the images that may be missing or broken.
      progress: show a progress bar on stderr.

    Returns:
      What regions.json holds: options, complete, images, files, written (by this run), counts of problems by
      kind, skipped (images left out: file, record, reason).

    Raises:
      ValueError: `out` is of other options, or more images than max_unreadable allows cannot be read.
      FloatingPointError: features are not finite in half precision.
    """
    out = Path(out)
    _check_options(out / MANIFEST, options)
    for leaving in out.glob(f"*{_PARTIAL}"):  # of a run that was stopped
        leaving.unlink()
    problems = list(plan.problems)
    listed = len(plan.images) + len(problems)
    _check_unreadable(problems, listed, max_unreadable)
    write_json(out / MANIFEST, {"options": options, "complete": False})
    todo = [image for image in plan.images if not all(_is_done(out, boxes) for boxes in image.files)]
    total = sum(len(image.files) for image in plan.images)
    left_out = written = 0
    with progress_bar("computing regions of images", len(todo), show=progress) as advance:

        def readable() -> Iterator[tuple[ImageBoxes, Loaded]]:
            nonlocal left_out
            for image, loaded in _decoded(todo, tower, workers):
                if isinstance(loaded, Loaded):
                    yield image, loaded
                    continue
                problems.append(
                    Problem("unreadable_image", image.split, str(image.image), image.record, loaded)
                )
                _check_unreadable(problems, listed, max_unreadable)
                left_out += len(image.files)
                advance(len(problems))

        for image, features in _computed(readable(), tower, batch_size):
            _write(out, image, features, num_classes)
            written += len(image.files)
            advance(len(problems))
    manifest = {
        "options": dict(options),
        "complete": True,
        "images": listed - len(problems),
        "files": total - left_out,
        "written": written,
        "counts": dict(Counter(p.kind for p in problems)),
        "skipped": [dataclasses.asdict(p) for p in problems],
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def fit_square(image: PIL.Image.Image, size: int, mean: Sequence[float]) -> Loaded:
    """A picture shrunk or enlarged (bicubic) to a long side of `size`, at the top left of a square.

    The proportions stay and nothing is cropped, for a box may lie anywhere. The rest of the square has the
    colour `mean` (in [0, 1]), which is 0 once normalised.
    """
    image = image.convert("RGB")
    longest = max(image.size)
    width, height = (max(1, round(side * size / longest)) for side in image.size)
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = np.round(np.array(mean) * 255)
    pixels[:height, :width] = np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
    return Loaded(pixels, (width, height))


def padded_count(count: int) -> int:
    """The number of boxes that is computed where the fullest image of a batch has `count`."""
    return max(_MIN_BOXES, 1 << (count - 1).bit_length())


def _decoded(
    images: Sequence[ImageBoxes], tower: RegionTower, workers: int
) -> Iterator[tuple[ImageBoxes, Loaded | str]]:
    """Images in order, or why they cannot be read; at most eight a thread in memory."""

    def load(path: Path) -> Loaded | str:
        try:
            with PIL.Image.open(path) as opened:
                return fit_square(opened, tower.image_size, tower.mean)
        except UNREADABLE as error:
            return f"not a readable image: {error}"

    todo = iter(images)
    pending: deque[tuple[ImageBoxes, Future[Loaded | str]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                for image in itertools.islice(todo, 8 * workers - len(pending)):
                    pending.append((image, pool.submit(load, image.image)))
                if not pending:
                    return
                image, future = pending.popleft()
                yield image, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _computed(
    images: Iterator[tuple[ImageBoxes, Loaded]], tower: RegionTower, batch_size: int
) -> Iterator[tuple[ImageBoxes, Float32[np.ndarray, "m c"]]]:
    """Features of all boxes of each image, file after file, and then of the whole image."""
    compute, variables = region_features(tower), jax.device_put(tower.variables)
    running: tuple[list[tuple[ImageBoxes, int]], jax.Array] | None = None

    def results() -> Iterator[tuple[ImageBoxes, Float32[np.ndarray, "m c"]]]:
        if running is not None:
            features = np.asarray(running[1])
            for (image, count), rows in zip(running[0], features[: len(running[0])], strict=True):
                yield image, rows[:count]

    while batch := list(itertools.islice(images, batch_size)):
        corners = [
            np.concatenate([*(boxes.corners for boxes in image.files), _WHOLE]) * np.array([*extent, *extent])
            for image, (_, extent) in batch
        ]
        size = tower.image_size
        pixels = np.zeros((batch_size, size, size, 3), np.uint8)
        boxes = np.zeros((batch_size, padded_count(max(map(len, corners))), 4), np.float32)
        for k, (_, loaded) in enumerate(batch):
            pixels[k], boxes[k, : len(corners[k])] = loaded.pixels, corners[k]
        started = compute(variables, pixels, boxes)
        yield from results()  # of the batch before, while the device has this one
        running = ([(image, len(rows)) for (image, _), rows in zip(batch, corners, strict=True)], started)
    yield from results()


def _write(out: Path, image: ImageBoxes, features: Float32[np.ndarray, "m c"], num_classes: int) -> None:
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    if not np.isfinite(half).all():
        raise FloatingPointError(
            f"{image.image}: features beyond half precision, the largest {np.abs(features).max():g}; are the "
            "weights damaged?"
        )
    start = 0
    for boxes in image.files:
        stop = start + len(boxes.corners)
        arrays = {
            "norm_bb": _norm_bb(boxes),
            "features": half[start:stop],
            "conf": boxes.conf[:, None],
            "image": half[-1],
        }
        if boxes.class_ids is not None:
            arrays["soft_labels"] = soft_labels(boxes.conf, boxes.class_ids, num_classes)
        partial = out / (boxes.file + _PARTIAL)
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, out / boxes.file)
        start = stop


def soft_labels(
    conf: Float32[np.ndarray, " n"], class_ids: np.ndarray, num_classes: int
) -> Float32[np.ndarray, "n k"]:
    """A distribution over background and classes from one class a box: `conf` on it, the rest on background.

    Class -1 is all background.
    """
    made = np.zeros((len(conf), 1 + num_classes), np.float32)
    known = np.where(class_ids >= 0, conf, 0)
    made[np.arange(len(conf)), 1 + class_ids] = known
    made[:, 0] = 1 - known
    return made


def _norm_bb(boxes: Boxes) -> Float32[np.ndarray, "n 6"]:
    return np.concatenate([boxes.corners, boxes.corners[:, 2:] - boxes.corners[:, :2]], axis=1)


def _is_done(out: Path, boxes: Boxes) -> bool:
    """Whether the file is there, whole, and of these boxes."""
    try:
        with np.load(out / boxes.file, allow_pickle=False) as file:
            return "features" in file.files and np.array_equal(file["norm_bb"], _norm_bb(boxes))
    except NPZ_DAMAGE:
        return False


def _check_options(path: Path, options: Mapping[str, Any]) -> None:
    if not path.is_file():
        return
    before = checked.field(checked.read_json(path), "options", dict, str(path))
    names = [name for name in {**options, **before} if before.get(name) != options.get(name)]
    if names:
        changes = ", ".join(f"{name}={before.get(name)!r} (now {options.get(name)!r})" for name in names)
        raise ValueError(f"{path.parent} was made with {changes}. Give another folder, or remove this one.")


def _check_unreadable(problems: Sequence[Problem], listed: int, max_unreadable: float | int) -> None:
    if len(problems) > max_unreadable * listed:
        first = "".join(f"\n  {p.file}, {p.record}: {p.reason}" for p in problems[:5])
        raise ValueError(
            f"{len(problems)} of {listed} images are missing or unreadable, more than "
            f"max_unreadable={max_unreadable} allows. Mend them, or allow more. The first:{first}"
        )
