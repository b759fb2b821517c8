"""From a config's data section to batches: write the embedded world, prepare, open, feed."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.experiment import Config, Stage, plain
from clipdistill_jax.train.schedules import from_mapping
from clipdistill_jax.train.sharding import process_parts


def open_dataset(config: Config, workdir: Path) -> "Dataset":
    """The dataset that a config names, written (the embedded world) and prepared if it is not there yet.

    `data.source` is the raw tree; empty, it is `workdir/world`, written as `world` says. `data.prepared` is
    where the prepared records lie; empty, `workdir/prepared`. `data.tokenizer` is a Hugging Face directory or
    hub id; "train:N" trains one of N entries on the training captions.

    Raises:
      ValueError: neither `data.source` nor `world` says where the data is; see also `prepare`.
      FileNotFoundError, FormatError: the tree or the tokenizer is not there or not whole.
    """
    # TensorFlow is imported here, not above, so that the rest runs where it is not installed.
    from clipdistill_jax.data.pipeline import RetrievalData
    from clipdistill_jax.data.shapes import WorldConfig, write_msrvtt
    from clipdistill_jax.data.video import VideoOptions
    from clipdistill_jax.prepare import prepare_msrvtt

    data = plain(config["data"])
    source = Path(data["source"] or workdir / "world").expanduser()
    if not data["source"]:
        if not config["world"]:
            raise ValueError(
                "data.source is empty: set it to the folder of the dataset (--config.data.source=DIR)"
            )
        write_msrvtt(source, from_mapping(WorldConfig, plain(config["world"])))
    prepared = Path(data["prepared"] or workdir / "prepared").expanduser()
    prepare_msrvtt(
        source,
        prepared,
        train=data["train"],
        num_validation=data["num_validation"],
        video=VideoOptions(
            fps=data["fps"],
            max_frames=data["max_frames"],
            size=data["stored_size"] or data["image_size"],
            store_square=data["store_square"],
        ),
        workers=data["workers"] or None,
        max_unreadable=data["max_unreadable"],
    )
    tokenizer = _tokenizer(data["tokenizer"], prepared, workdir)
    opened = RetrievalData(prepared, tokenizer, max_tokens=data["max_tokens"])
    pairs = source / "motion_pairs.json"
    return Dataset(opened, data["image_size"], data["num_frames"], tokenizer.vocab_size, pairs)


def _tokenizer(name: str, prepared: Path, workdir: Path) -> Any:
    from clipdistill_jax.data.index import read_index
    from clipdistill_jax.data.text import Tokenizer, train_clip_bpe

    if not name.startswith("train:"):
        return Tokenizer.from_dir(name)
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        captions = [text for said in read_index(prepared, "train").captions for text in said]
        train_clip_bpe(captions, int(name.removeprefix("train:")), folder)
    return Tokenizer.from_dir(folder)


class Dataset:
    """Prepared data as a stage wants it.

    Attributes:
      vocab_size: of the tokenizer.
      splits: their names.
    """

    def __init__(self, data: Any, image_size: int, num_frames: int, vocab_size: int, pairs: Path) -> None:
        self._data, self._image_size, self._num_frames, self._pairs = data, image_size, num_frames, pairs
        self.vocab_size = vocab_size
        self.splits: tuple[str, ...] = data.splits

    def train_batches(
        self, stage: Stage, start: int, seed: int, mesh: Mesh
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's rows of the batches of steps `start`, `start` + 1, ..."""
        settings = stage.config
        index, count = process_parts(mesh)
        return self._data.batches(
            start,
            batch_size=settings["batch_size"],
            num_frames=settings["num_frames"] or self._num_frames,
            image_size=self._image_size,
            seed=seed,
            captions=settings["captions"],
            frame_sampling=settings["frame_sampling"],
            max_clips=settings["max_clips"] or None,
            process_index=index,
            process_count=count,
        )

    def split(self, name: str, stage: Stage, mesh: Mesh) -> Split:
        """A split as the evaluator wants it."""
        index, count = process_parts(mesh)
        parts = {
            "batch_size": stage.config["eval_batch_size"],
            "process_index": index,
            "process_count": count,
        }
        return Split(
            clips=partial(
                self._data.eval_clips,
                name,
                num_frames=stage.config["num_frames"] or self._num_frames,
                image_size=self._image_size,
                **parts,
            ),
            texts=partial(self._data.eval_captions, name, **parts),
            clip_of_text=self._data.clip_of_caption(name),
            pairs=[(a, b) for a, b, _ in self.motion_pairs(name)],
        )

    def motion_pairs(self, split: str) -> list[tuple[int, int, str]]:
        """Clips of the split that differ only in motion, and in what; none where the source lists none."""
        if not self._pairs.exists():
            return []
        place = {video_id: i for i, video_id in enumerate(self._data.video_ids(split))}
        listed = json.loads(self._pairs.read_text())
        return [(place[a], place[b], kind) for a, b, kind in listed if a in place and b in place]

    def describe(self, split: str) -> dict[str, np.ndarray]:
        """What a report needs to read a score matrix: video ids, captions, clip_of_text, pairs."""
        pairs = self.motion_pairs(split)
        return {
            "video_ids": np.array(self._data.video_ids(split)),
            "captions": np.array(self._data.captions(split)),
            "clip_of_text": self._data.clip_of_caption(split),
            "pairs": np.array([(a, b) for a, b, _ in pairs], np.int32).reshape(-1, 2),
            "pair_kinds": np.array([kind for _, _, kind in pairs]),
        }
