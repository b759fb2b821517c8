"""From a config's data section to batches: write the embedded world, prepare, open, feed."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.experiment import MODELS, Config, Stage, plain
from clipdistill_jax.systems.questions import QUESTIONS
from clipdistill_jax.systems.retrieval import own_tokens
from clipdistill_jax.train.schedules import from_mapping
from clipdistill_jax.train.sharding import process_parts


def open_dataset(config: Config, home: Path) -> Any:
    """The dataset that a config names, written (the embedded world) and prepared if it is not there yet.

    `data.source` is the raw tree, laid out as `data.format` says; empty, it is `home/world`, where `world`
    is written in that format. `data.prepared` is where the prepared records lie; empty, `home/prepared`.
    Of questions (formats vcr, snli_ve, vqa), a `question_dataset.QuestionDataset`.
    `data.tokenizer` is a Hugging Face directory or hub id; "train:N" trains one of N entries on the training
    captions. `data.student_tokenizer` is the same for a student that reads other tokens.

    Raises:
      ValueError: there is no such format, or neither `data.source` nor `world` says where the data is; see
        also `prepare`.
      FileNotFoundError, FormatError: the tree or the tokenizer is not there or not whole.
    """
    # TensorFlow is imported here, not above, so that the rest runs where it is not installed.
    from clipdistill_jax.data.formats import reader_options
    from clipdistill_jax.data.pipeline import RetrievalData
    from clipdistill_jax.data.shapes import WORLDS, WRITERS
    from clipdistill_jax.data.tokenizer import open_tokenizer
    from clipdistill_jax.data.video import VideoOptions
    from clipdistill_jax.prepare import prepare_dataset
    from clipdistill_jax.question_dataset import open_questions

    data = plain(config["data"])
    source = Path(data["source"] or home / "world").expanduser()
    if not data["source"]:
        if not config["world"]:
            raise ValueError(
                "data.source is empty: set it to the folder of the dataset (--config.data.source=DIR)"
            )
        world = WORLDS[data["format"]]
        WRITERS[data["format"]](source, from_mapping(world, plain(config["world"])))
    if data["format"] in QUESTIONS:
        return open_questions(config, home, source)
    options = {name: data[name] for name in reader_options(data["format"])}
    prepared = Path(data["prepared"] or home / "prepared").expanduser()
    prepare_dataset(
        data["format"],
        source,
        prepared,
        video=VideoOptions(
            fps=data["fps"],
            max_frames=data["max_frames"],
            size=data["stored_size"] or data["image_size"],
            store_square=data["store_square"],
        ),
        workers=data["workers"] or None,
        max_unreadable=data["max_unreadable"],
        **options,
    )
    captions = partial(_training_captions, prepared)
    tokenizers = {"teacher": open_tokenizer(data["tokenizer"], "clip", captions, home / "tokenizer")}
    if data["student_tokenizer"]:
        kind, folder = config["student"]["text"]["kind"], home / "student_tokenizer"
        tokenizers["student"] = open_tokenizer(data["student_tokenizer"], kind, captions, folder)
    opened = RetrievalData(
        prepared, tokenizers["teacher"], max_tokens=data["max_tokens"], student=tokenizers.get("student")
    )
    pairs = source / "motion_pairs.json"
    vocab = {model: tokenizers.get(model, tokenizers["teacher"]).vocab_size for model in MODELS}
    return Dataset(opened, data["image_size"], vocab, json.loads(pairs.read_text()) if pairs.exists() else [])


def _training_captions(prepared: Path) -> list[str]:
    from clipdistill_jax.data.index import read_index

    return [text for said in read_index(prepared, "train").captions for text in said]


class Dataset:
    """Prepared data as a stage wants it.

    Attributes:
      vocab: {"teacher": entries of its tokenizer, "student": ...}.
      splits: their names.
      shapes: that batches have.
    """

    shapes = 1

    def __init__(self, data: Any, image_size: int, vocab: dict[str, int], pairs: list[list[str]]) -> None:
        self._data, self._image_size, self._pairs = data, image_size, pairs
        self.vocab = vocab
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
            num_frames=settings["num_frames"],
            image_size=self._image_size,
            seed=seed,
            captions=settings["captions"],
            frame_sampling=settings["frame_sampling"],
            max_clips=settings["max_clips"] or None,
            process_index=index,
            process_count=count,
        )

    @property
    def final_split(self) -> str:
        """The split that results are of."""
        return "test"

    @property
    def answers(self) -> None:
        """Clips have no answers."""

    def check_answers(self, stage: Path) -> None:
        """Clips have no answers: there is nothing to check."""

    def note_selection(self, stage: Stage, seed: int, folder: Path) -> None:
        """A stage of clips takes the first `max_clips`: there is nothing to write down."""

    def train_sizes(self, stage: Stage, seed: int) -> dict[str, Any]:
        """Clips that a stage draws from, and captions that these have."""
        clip_of_caption = self._data.clip_of_caption("train")
        clips = min(stage.config["max_clips"] or sys.maxsize, len(self._data.video_ids("train")))
        return {"clips": clips, "captions": int((clip_of_caption < clips).sum())}

    def cache_inputs(self, stage: Stage) -> dict[str, Callable[[np.ndarray], Iterable[Mapping[str, Any]]]]:
        """Batches of training clips and captions by id [batches, b]; -1 fills a batch."""
        sizes = {"num_frames": stage.config["num_frames"], "image_size": self._image_size}
        return {
            "clips": lambda ids: self._data.clip_batches("train", ids, **sizes),
            "captions": lambda ids: self._data.caption_batches("train", ids),
        }

    def identity(self, stage: Stage) -> dict[str, str | int]:
        """What a frozen model's vectors of the training split depend on, beside the model."""
        return {
            "data": self._data.fingerprint("train"),
            "num_frames": stage.config["num_frames"],
            "image_size": self._image_size,
        }

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
                num_frames=stage.config["num_frames"],
                image_size=self._image_size,
                **parts,
            ),
            texts=lambda: (
                own_tokens(batch, stage.config["model"]) for batch in self._data.eval_captions(name, **parts)
            ),
            clip_of_text=self._data.clip_of_caption(name),
            pairs=[(a, b) for a, b, _ in self.motion_pairs(name)],
        )

    def motion_pairs(self, split: str) -> list[tuple[int, int, str]]:
        """Clips of the split that differ only in motion, and in what; none where the source lists none."""
        place = {video_id: i for i, video_id in enumerate(self._data.video_ids(split))}
        return [(place[a], place[b], kind) for a, b, kind in self._pairs if a in place and b in place]

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
