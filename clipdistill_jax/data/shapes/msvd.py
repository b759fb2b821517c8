"""The world as an MSVD tree."""

from __future__ import annotations

import pickle
from pathlib import Path

from clipdistill_jax.data.shapes.tree import World, sentences, write_tree
from clipdistill_jax.data.shapes.world import WorldConfig

_LISTS = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}


def write_msvd(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as an MSVD tree, see `write_tree`: `config.captions` captions of every clip."""
    return write_tree(folder, config, _annotate, format="msvd", workers=workers)


def _annotate(folder: Path, world: World, config: WorldConfig) -> None:
    said = sentences(world, train=config.captions, evaluation=config.captions)
    words = {video_id: [caption.split() for caption in many] for video_id, many in said.items()}
    with (folder / "raw-captions.pkl").open("wb") as file:
        pickle.dump(words, file, protocol=2)  # the dataset's own format; plain values alone
    for split, name in _LISTS.items():
        (folder / name).write_text("".join(f"{scene.video_id}\n" for scene in world[split]))
