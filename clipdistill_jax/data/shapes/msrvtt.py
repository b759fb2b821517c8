"""The world as an MSR-VTT tree."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from clipdistill_jax.data.shapes.tree import World, sentences, write_tree
from clipdistill_jax.data.shapes.world import WorldConfig


def write_msrvtt(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as an MSR-VTT tree, see `write_tree`.

    MSRVTT_train.9k.csv lists every training clip and MSRVTT_train.7k.csv the first `train_small`.
    MSRVTT_val.csv and MSRVTT_JSFUSION_test.csv give one telling caption a clip.
    """
    return write_tree(folder, config, _annotate, format=None, workers=workers)


def _annotate(folder: Path, world: World, config: WorldConfig) -> None:
    said = sentences(world, train=config.captions, evaluation=1)
    annotations = {
        "videos": [{"video_id": name, "url": ""} for name in said],
        "sentences": [
            {"video_id": name, "caption": caption, "sen_id": i}
            for i, (name, caption) in enumerate(
                (name, caption) for name, many in said.items() for caption in many
            )
        ],
    }
    (folder / "MSRVTT_data.json").write_text(json.dumps(annotations))
    train = [{"video_id": scene.video_id} for scene in world["train"]]
    _write_csv(folder / "MSRVTT_train.9k.csv", train)
    _write_csv(folder / "MSRVTT_train.7k.csv", train[: config.train_small])
    for name, split in (("MSRVTT_val.csv", "validation"), ("MSRVTT_JSFUSION_test.csv", "test")):
        _write_csv(
            folder / name,
            ({"video_id": s.video_id, "sentence": said[s.video_id][0]} for s in world[split]),
        )


def _write_csv(path: Path, rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
