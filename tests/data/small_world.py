"""A world of a few clips in any format: from its files to batches, compared with the scenes themselves."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from clipdistill_jax.data.index import read_manifest
from clipdistill_jax.data.pipeline import RetrievalData
from clipdistill_jax.data.shapes import Scene, WorldConfig, scenes
from clipdistill_jax.data.shapes.drawing import render
from clipdistill_jax.data.tokenizer import load_tokenizer
from clipdistill_jax.dataset import Dataset, open_dataset
from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.experiment import build_stage, plain
from clipdistill_jax.train import sharding
from tests.tiny_config import get_config

WORLD = WorldConfig(train=8, train_small=4, validation=3, test=4, twin_pairs=1, captions=3)
SPLITS = {"train": 8, "validation": 3, "test": 4}


def open_world(format: str, workdir: Path) -> Dataset:
    """`WORLD` written, prepared and opened as a config does it."""
    config = plain(get_config())
    config["data"]["format"] = format
    config["world"] = dict(train=8, train_small=4, validation=3, test=4, twin_pairs=1, captions=3)
    return open_dataset(config, workdir)


def evaluation_split(dataset: Dataset) -> Split:
    """The test split as the evaluator gets it."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage = build_stage(plain(get_config()), "alone", mesh, dataset.vocab)
    return dataset.split("test", stage, mesh)


def check(
    format: str,
    workdir: Path,
    captions: Callable[[Scene, str], list[str]],
    clip_id: Callable[[str], str] = str,
) -> Dataset:
    """Ids, captions, frames and batches of every split against the scenes.

    Args:
      captions: what the format keeps of a scene of a split.
      clip_id: the format's id of a clip, from the world's.
    """
    dataset = open_world(format, workdir)
    manifest = read_manifest(workdir / "prepared")
    assert {split: n["clips"] for split, n in manifest["splits"].items()} == SPLITS
    assert manifest["counts"] == {} and manifest["options"]["format"] == format
    data = RetrievalData(workdir / "prepared", load_tokenizer(workdir / "tokenizer"), max_tokens=8)
    world = scenes(WORLD)
    for split, members in world.items():
        expected = [captions(scene, split) for scene in members]
        assert data.captions(split) == [text for texts in expected for text in texts]
        clip_of_caption = np.repeat(np.arange(len(members)), [len(texts) for texts in expected])
        np.testing.assert_array_equal(data.clip_of_caption(split), clip_of_caption)
        assert list(data.video_ids(split)) == [clip_id(scene.video_id) for scene in members]
        said = list(data.eval_captions(split, batch_size=4))
        rows = np.concatenate([batch["clip_id"][batch["mask"]] for batch in said])
        np.testing.assert_array_equal(rows, clip_of_caption)
        (batch,) = data.eval_clips(split, batch_size=len(members), num_frames=3, image_size=16)
        assert batch["frame_mask"].all()
        # Rendered again and halved, each scene is nearest to its own clip. A frame of each second is stored.
        times = np.linspace(0, 1, WORLD.seconds * WORLD.fps + 1)
        drawn = np.stack([render(scene, times, WORLD)[:: WORLD.fps] for scene in members]).astype(float)
        drawn = drawn.reshape(*drawn.shape[:2], 16, 2, 16, 2, 3).mean((3, 5))
        distance = abs(batch["frames"][:, None].astype(float) - drawn[None]).mean((2, 3, 4, 5))
        np.testing.assert_array_equal(distance.argmin(1), np.arange(len(members)))
    batches = data.batches(batch_size=6, num_frames=2, image_size=16, seed=1)
    batch = next(batches)
    batches.close()
    assert batch["frames"].shape == (6, 2, 16, 16, 3) and batch["frames"].any((1, 2, 3, 4)).all()
    np.testing.assert_array_equal(batch["clip_id"], data.clip_of_caption("train")[batch["example_id"]])
    ((a, b, _),) = dataset.motion_pairs("test")
    assert (a, b) == (0, 1)
    return dataset


def touch(folder: Path, *names: str) -> None:
    """Files that stand for videos; readers do not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
