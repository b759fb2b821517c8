"""Trees of stills: what the writers of questions and of image captions share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.shapes.detections import write_detections, write_ground_truth
from clipdistill_jax.data.shapes.painting import paint
from clipdistill_jax.data.shapes.scenes import SPLITS, SceneConfig, Still, class_name, draw_still
from clipdistill_jax.data.shapes.tree import is_written, mark_written

REGIONS = "regions"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of a tree and the files beside it; paths are relative to the tree, "" for none.

    Attributes:
      image: the JPEG.
      metadata: VCR's json of boxes.
      ground_truth, detected: npz files of regions, under REGIONS.
    """

    still: Still
    image: str
    metadata: str = ""
    ground_truth: str = ""
    detected: str = ""


# The pictures of a tree, and its annotation files: name -> text.
Plan = tuple[list[Picture], dict[str, str]]


def write_stills(
    folder: str | Path,
    config: SceneConfig,
    plan: Callable[[SceneConfig], Plan],
    *,
    format: str,
    workers: int | None = None,
) -> Path:
    """Writes a tree of stills and returns its folder; at once if it is there already.

    Args:
      folder: of the tree.
      config: sizes and rates.
      plan: what is in the tree.
      format: the format's name, for world.json, which is written last.
      workers: painting processes; one a core when None; 1: this process.

    Raises:
      ValueError: the folder holds a world of other settings, or of another format.
    """
    folder = Path(folder)
    settings = {"format": format, **dataclasses.asdict(config)}
    if is_written(folder, settings):
        return folder
    pictures, texts = plan(config)
    parts = [pictures[i : i + 100] for i in range(0, len(pictures), 100)]
    write = partial(_write_pictures, folder, config)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar("painting stills", len(pictures)))
        context = multiprocessing.get_context("spawn")
        pool = None if workers == 1 else ProcessPoolExecutor(workers or os.cpu_count(), context)
        for count in stack.enter_context(pool).map(write, parts) if pool else map(write, parts):
            for _ in range(count):
                advance(0)
    for name, text in texts.items():
        (folder / name).write_text(text)
    mark_written(folder, settings)
    return folder


def draw_stills(
    config: SceneConfig, format: str, fits: Callable[[Still], bool] = lambda still: True
) -> dict[str, list[Still]]:
    """The scenes of every split, a function of the config and the format's name."""
    drawn = {}
    for split in SPLITS:
        rng, taken = random.Random(f"{config.seed}/{format}/{split}"), set[tuple]()
        drawn[split] = [draw_still(rng, split, taken, fits) for _ in range(getattr(config, split))]
    return drawn


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write_pictures(folder: Path, config: SceneConfig, part: list[Picture]) -> int:
    for picture in part:
        still = picture.still
        pixels, boxes = paint(still, config)
        path = folder / picture.image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95, subsampling=0)
        if picture.metadata:
            (folder / picture.metadata).write_text(json.dumps(_metadata(still, boxes.tolist(), config.size)))
        for name, write in ((picture.ground_truth, write_ground_truth), (picture.detected, write_detections)):
            if name:
                write(folder / REGIONS / name, still, pixels, boxes, config)
    return len(part)


def _metadata(still: Still, boxes: list[list[float]], size: int) -> dict:
    return {
        "names": [class_name(thing) for thing in still.objects],
        "boxes": [[*box, 1.0] for box in boxes],
        "segms": [[[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]] for x1, y1, x2, y2 in boxes],
        "width": size,
        "height": size,
    }
