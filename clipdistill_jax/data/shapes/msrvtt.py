"""The world as an MSR-VTT tree."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.shapes.drawing import render, write_clip
from clipdistill_jax.data.shapes.world import Scene, WorldConfig, captions, motion_kind, scenes


def _write_clips(folder: Path, part: list[Scene], config: WorldConfig) -> int:
    count = config.seconds * config.fps + 1
    for scene in part:
        frames = render(scene, np.linspace(0, 1, count), config)
        write_clip(folder / f"{scene.video_id}.mp4", frames, config.fps)
    return len(part)


def _write_csv(path: Path, rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_msrvtt(folder: str | Path, config: WorldConfig, workers: int | None = None) -> Path:
    """Writes the world as an MSR-VTT tree and returns its folder; at once if it is there already.

    MSRVTT_train.9k.csv lists every training clip and MSRVTT_train.7k.csv the first `train_small`.
    MSRVTT_val.csv and MSRVTT_JSFUSION_test.csv give one telling caption a clip. motion_pairs.json, which
    MSR-VTT does not have, lists the twins of the test split: [video_id, video_id, what they differ in].
    world.json, written last, holds the config.

    Raises:
      ValueError: the folder holds a world of other settings.
    """
    folder = Path(folder)
    stamp, described = folder / "world.json", json.dumps(dataclasses.asdict(config), indent=1)
    if stamp.exists():
        if stamp.read_text() != described:
            raise ValueError(f"{folder} holds a world of other settings ({stamp}): choose another folder")
        return folder
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    world = scenes(config)
    everything = [scene for split in world.values() for scene in split]
    parts = [everything[i : i + 100] for i in range(0, len(everything), 100)]
    with (
        ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
        progress_bar("rendering clips", len(everything)) as advance,
    ):
        for done in pool.map(_write_clips, [videos] * len(parts), parts, [config] * len(parts)):
            for _ in range(done):
                advance(0)

    sentences: dict[str, list[str]] = {}
    for split, members in world.items():
        for scene in members:
            sentences[scene.video_id] = captions(
                scene, config.captions if split == "train" else 1, split == "train"
            )
    annotations = {
        "videos": [{"video_id": name, "url": ""} for name in sentences],
        "sentences": [
            {"video_id": name, "caption": said, "sen_id": i}
            for i, (name, said) in enumerate(
                (name, said) for name, many in sentences.items() for said in many
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
            ({"video_id": s.video_id, "sentence": sentences[s.video_id][0]} for s in world[split]),
        )
    twins = world["test"][: 2 * config.twin_pairs]
    pairs = [[a.video_id, b.video_id, motion_kind(a)] for a, b in zip(twins[::2], twins[1::2], strict=True)]
    (folder / "motion_pairs.json").write_text(json.dumps(pairs))
    stamp.write_text(described)
    return folder
