"""The world as an ActivityNet Captions tree."""

from __future__ import annotations

import json
from pathlib import Path

from clipdistill_jax.data.shapes.tree import PARAGRAPH, World, sentences, write_tree
from clipdistill_jax.data.shapes.world import WorldConfig


def write_activitynet(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as an ActivityNet Captions tree, see `write_tree`: two sentences a clip.

    validation_ids.json, which the dataset does not have, lists the world's validation split.
    """
    return write_tree(
        folder,
        config,
        _annotate,
        format="activitynet",
        clip_id=lambda name: f"v_{name}",
        video_file=lambda video_id: f"{video_id.removeprefix('v_')}.mp4",
        workers=workers,
    )


def _annotate(folder: Path, world: World, config: WorldConfig) -> None:
    said = sentences(world, train=PARAGRAPH, evaluation=PARAGRAPH)
    ids = {split: [scene.video_id for scene in members] for split, members in world.items()}
    length = float(config.seconds)
    files = {"train.json": ids["train"] + ids["validation"], "val_1.json": ids["test"]}
    for name, members in files.items():
        annotations = {
            video_id: {
                "duration": length,
                "timestamps": [[0.0, length] for _ in said[video_id]],  # each tells of the whole clip
                "sentences": said[video_id],
            }
            for video_id in members
        }
        (folder / name).write_text(json.dumps(annotations))
    lists = {"train_ids.json": "train", "validation_ids.json": "validation", "val_ids.json": "test"}
    for name, split in lists.items():
        (folder / name).write_text(json.dumps(ids[split]))
