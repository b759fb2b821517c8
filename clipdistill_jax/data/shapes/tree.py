"""The world as files: what the writers of all formats share."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.shapes.drawing import render, write_clip
from clipdistill_jax.data.shapes.world import Scene, WorldConfig, captions, motion_kind, scenes

World = dict[str, list[Scene]]  # by split
# Sentences of a paragraph, in the formats where a clip's captions are joined to one.
PARAGRAPH = 2
_STAMP = "world.json"


def write_tree(
    folder: str | Path,
    config: WorldConfig,
    annotate: Callable[[Path, World, WorldConfig], None],
    *,
    format: str | None,
    clip_id: Callable[[str], str] = lambda name: name,
    video_file: Callable[[str], str] = lambda video_id: f"{video_id}.mp4",
    workers: int | None = None,
) -> Path:
    """Writes the world in one dataset's files and returns its folder; at once if it is there already.

    The same scenes, frames and sentences in every format. motion_pairs.json, which no dataset has, lists the
    twins of the test split: [id, id, what they differ in]. world.json, written last, holds the config.

    Args:
      folder: of the tree.
      config: the world.
      annotate: writes the lists and captions; its scenes have the dataset's ids.
      format: the format's name for world.json; None for MSR-VTT, whose worlds do not say it.
      clip_id: the dataset's id of a clip, from the world's.
      video_file: file of an id, under videos/.
      workers: rendering processes; one a core when None.

    Raises:
      ValueError: the folder holds a world of other settings, or of another format.
    """
    folder = Path(folder)
    settings = {**({"format": format} if format else {}), **dataclasses.asdict(config)}
    if is_written(folder, settings):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    world = {
        split: [dataclasses.replace(scene, video_id=clip_id(scene.video_id)) for scene in members]
        for split, members in scenes(config).items()
    }
    clips = [
        (folder / "videos" / video_file(scene.video_id), scene)
        for members in world.values()
        for scene in members
    ]
    parts = [clips[i : i + 100] for i in range(0, len(clips), 100)]
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
        progress_bar("rendering clips", len(clips)) as advance,
    ):
        for done in pool.map(_write_clips, parts, [config] * len(parts)):
            for _ in range(done):
                advance(0)
    annotate(folder, world, config)
    twins = world["test"][: 2 * config.twin_pairs]
    pairs = [[a.video_id, b.video_id, motion_kind(a)] for a, b in zip(twins[::2], twins[1::2], strict=True)]
    (folder / "motion_pairs.json").write_text(json.dumps(pairs))
    mark_written(folder, settings)
    return folder


def is_written(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the world of these settings, whole.

    Raises:
      ValueError: it holds a world of others.
    """
    stamp = folder / _STAMP
    if stamp.exists() and stamp.read_text() != _described(settings):
        raise ValueError(f"{folder} holds a world of other settings ({stamp}): choose another folder")
    return stamp.exists()


def mark_written(folder: Path, settings: dict[str, Any]) -> None:
    """Notes that the world of these settings is whole."""
    (folder / _STAMP).write_text(_described(settings))


def _described(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=1)


def sentences(world: World, *, train: int, evaluation: int) -> dict[str, list[str]]:
    """id -> what is said of the clip: `train` partial sentences, or `evaluation` telling ones."""
    return {
        scene.video_id: captions(scene, train if split == "train" else evaluation, split == "train")
        for split, members in world.items()
        for scene in members
    }


def _write_clips(part: list[tuple[Path, Scene]], config: WorldConfig) -> int:
    count = config.seconds * config.fps + 1
    for path, scene in part:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, render(scene, np.linspace(0, 1, count), config), config.fps)
    return len(part)
