"""The world as a DiDeMo tree."""

from __future__ import annotations

import json
from pathlib import Path

from clipdistill_jax.data.shapes.tree import PARAGRAPH, World, sentences, write_tree
from clipdistill_jax.data.shapes.world import WorldConfig

_NAMES = {"train": "train", "validation": "val", "test": "test"}


def write_didemo(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as a DiDeMo tree, see `write_tree`: two moments a clip, ids are file names."""
    return write_tree(
        folder,
        config,
        _annotate,
        format="didemo",
        clip_id=lambda name: f"{name}.mp4",
        video_file=lambda video_id: video_id,
        workers=workers,
    )


def _annotate(folder: Path, world: World, config: WorldConfig) -> None:
    said = sentences(world, train=PARAGRAPH, evaluation=PARAGRAPH)
    last = config.seconds // 5  # a moment is first and last part of five seconds; ours are whole clips
    for split, name in _NAMES.items():
        moments = [
            {
                "video": scene.video_id,
                "description": sentence,
                "times": [[0, last]] * 4,
                "num_segments": last + 1,
            }
            for scene in world[split]
            for sentence in said[scene.video_id]
        ]
        numbered = [{"annotation_id": k, **moment} for k, moment in enumerate(moments)]
        (folder / f"{name}_data.json").write_text(json.dumps(numbered))
        (folder / f"{name}_list.txt").write_text("".join(f"{scene.video_id}\n" for scene in world[split]))
