"""What a weak detector would know of a still: boxes, shrunken pixels, and a guess of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8
from PIL import Image

from clipdistill_jax.data.shapes.scenes import ITEMS, SceneConfig, Still, class_name

CLASSES = ("person", *ITEMS)  # after the background
_MISSED, _FALSE = 0.1, (1, 3)  # share of objects not found; fewest and most false detections
_JITTER = 0.02  # of a side


def write_ground_truth(
    path: Path,
    still: Still,
    image: UInt8[np.ndarray, "side side 3"],
    boxes: Float32[np.ndarray, "n 4"],
    config: SceneConfig,
) -> None:
    """Writes the regions of the given boxes, those of `still.objects`, in their order."""
    rng = np.random.default_rng([still.seed, 1])
    probs = _class_probs(_classes(still), rng)
    _write(path, image, boxes.astype(float), probs, config, rng)


def write_detections(
    path: Path,
    still: Still,
    image: UInt8[np.ndarray, "side side 3"],
    boxes: Float32[np.ndarray, "n 4"],
    config: SceneConfig,
) -> None:
    """Writes what the detector finds: most objects, a little off, and some false ones; surest first."""
    rng = np.random.default_rng([still.seed, 2])
    side = config.size
    found = rng.random(len(boxes)) >= _MISSED
    near = boxes[found] + rng.normal(0, _JITTER * side, (found.sum(), 4))
    count = int(rng.integers(_FALSE[0], _FALSE[1] + 1))
    corners = rng.uniform(0, 0.7 * side, (count, 2))
    false = np.concatenate([corners, corners + rng.uniform(0.2, 0.5, (count, 2)) * side], axis=1)
    every = np.clip(np.concatenate([near, false]), 0, side)
    # A box stays a box: at least two pixels a side.
    every[:, :2] = np.minimum(every[:, :2], side - 2)
    every[:, 2:] = np.maximum(every[:, 2:], every[:, :2] + 2)
    kinds = np.concatenate([_classes(still)[found], np.zeros(count, int)])
    probs = _class_probs(kinds, rng)
    order = np.argsort(-probs[:, 1:].max(1), kind="stable")
    _write(path, image, every[order], probs[order], config, rng)


def _classes(still: Still) -> Int[np.ndarray, " n"]:
    return np.array([1 + CLASSES.index(class_name(thing)) for thing in still.objects])


def _class_probs(kinds: Int[np.ndarray, " n"], rng: np.random.Generator) -> Float64[np.ndarray, "n k"]:
    """Rows of a distribution over background and CLASSES, mostly surest of the given kind."""
    scores = rng.normal(0, 1, (len(kinds), 1 + len(CLASSES)))
    scores[np.arange(len(kinds)), kinds] += rng.uniform(1.5, 5, len(kinds))
    scores = np.exp(scores)
    return scores / scores.sum(1, keepdims=True)


def _write(
    path: Path,
    image: UInt8[np.ndarray, "side side 3"],
    boxes: Float64[np.ndarray, "n 4"],
    probs: Float64[np.ndarray, "n k"],
    config: SceneConfig,
    rng: np.random.Generator,
) -> None:
    """An npz as UNITER's extractor writes them, see `data.regions.uniter`."""
    picture, side = Image.fromarray(image), (config.region_side,) * 2
    crops = [picture.resize(side, Image.Resampling.BOX, box=tuple(box)) for box in boxes.tolist()]
    pixels = np.stack([np.asarray(crop) for crop in crops]).reshape(len(boxes), -1) / 127.5 - 1
    corners = boxes / config.size
    arrays = {
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
        "features": pixels + rng.normal(0, config.region_noise, pixels.shape),
        "conf": probs[:, 1:].max(1, keepdims=True),
        "soft_labels": probs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value.astype(np.float16) for name, value in arrays.items()})
