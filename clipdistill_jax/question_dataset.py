"""From a config's data section to batches of questions about images: write the world, prepare, open, feed."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.data.vocabulary import UNKNOWN
from clipdistill_jax.evaluate.choices import QuestionSplit
from clipdistill_jax.experiment import Config, Stage, plain
from clipdistill_jax.train.sharding import process_parts


def open_questions(config: Config, home: Path, source: Path) -> "QuestionDataset":
    """The questions that a config names, prepared if they are not yet; see `dataset.open_dataset`."""
    from clipdistill_jax.data.questions.layout import StudentText
    from clipdistill_jax.data.questions.pipeline import QuestionData
    from clipdistill_jax.data.questions.prepare import prepare_questions
    from clipdistill_jax.data.tokenizer import open_tokenizer

    data, student = plain(config["data"]), plain(config["student"])
    prepared = Path(data["prepared"] or home / "prepared").expanduser()
    prepare_questions(
        data["format"],
        source,
        prepared,
        regions=Path(data["regions"] or source / "regions").expanduser(),
        region_format=data["region_format"],
        region_width=data["region_width"],
        max_regions=data["max_regions"],
        stored_size=data["stored_size"] or data["image_size"],
        store_square=data["store_square"],
        answers=data["answers"],
        clip_text=data["clip_text"],
        workers=data["workers"] or None,
        allow_missing=data["allow_missing"],
    )
    learned = partial(_training_texts, prepared)
    wordpiece = open_tokenizer(data["student_tokenizer"], "bert", learned, home / "student_tokenizer")
    clip = (
        open_tokenizer(data["tokenizer"], "clip", learned, home / "tokenizer") if data["tokenizer"] else None
    )
    text = StudentText(student["kind"], wordpiece, persons=data["format"] == "vcr")
    opened = QuestionData(
        prepared,
        student=text,
        clip=clip,
        max_tokens=data["max_tokens"],
        clip_tokens=data["clip_tokens"],
        clip_text=data["clip_text"],
        image_size=data["image_size"],
        questions=data["questions"] if data["format"] == "vcr" else (data["format"].removeprefix("snli_"),),
        buckets=data["buckets"],
    )
    return QuestionDataset(opened, text, clip, data)


def _training_texts(prepared: Path) -> list[str]:
    from clipdistill_jax.data.questions.index import read_texts
    from clipdistill_jax.data.questions.items import KINDS

    contexts, choices = read_texts(prepared, "train", KINDS)
    return [text for texts in (*contexts, *choices) for text in texts]


class QuestionDataset:
    """Prepared questions as a stage wants them.

    Attributes:
      vocab: see `systems.questions.QuestionSystem`.
      splits: their names.
    """

    def __init__(self, data: Any, student: Any, clip: Any, settings: Mapping[str, Any]) -> None:
        self._data, self._student, self._clip, self._settings = data, student, clip, settings
        self.splits: tuple[str, ...] = data.splits
        self._described: dict[str, dict[str, np.ndarray]] = {}
        words = student.tokenizer.plain_ids
        self.vocab: dict[str, Any] = {
            "student": student.vocab_size,
            "mask": student.special_tokens["mask"],
            "random_low": words.start,
            "random_high": words.stop,
        }
        if clip is not None:
            self.vocab["teacher"] = clip.vocab_size
        if data.answers is not None:
            self.vocab["answers"] = len(data.answers)
            self.vocab["answer_tokens"] = student.tokenizer.encode_words(data.answers.answers)
            if UNKNOWN in data.answers.index:
                self.vocab["unknown"] = data.answers.index[UNKNOWN]
        if data.object_classes:
            self.vocab["object_classes"] = len(data.object_classes)
        if data.region_classes:
            self.vocab["region_classes"] = data.region_classes

    @property
    def shapes(self) -> int:
        """Shapes that training batches have."""
        return len(self._data.shapes("train"))

    @property
    def final_split(self) -> str:
        """The split that results are of: the test split where its answers are known."""
        for name in ("test", "validation"):
            if name in self.splits and self._data.split(name).has_label().any():
                return name
        raise ValueError("neither the test nor the validation split has labels: there is nothing to report")

    @property
    def answers(self) -> str | None:
        """Fingerprint of VQA's classes, which a stage's result keeps."""
        return self._data.answers.fingerprint if self._data.answers is not None else None

    def check_answers(self, stage: Path) -> None:
        """Raises ValueError where a finished stage in that folder has other classes."""
        known = json.loads((stage / "result.json").read_text()).get("answers")
        if known and self._data.answers is not None:
            self._data.answers.check(known, str(stage))

    def selection(self, stage: Stage, seed: int) -> Any:
        """The training records that a stage's protocol draws."""
        from clipdistill_jax.data.protocol import GROUPS, select

        settings, among = stage.config, GROUPS[self._settings["format"]]
        groups = self._data.groups("train")
        return select(groups, protocol=settings["protocol"], shots=settings["shots"], seed=seed, among=among)

    def note_selection(self, stage: Stage, seed: int, folder: Path) -> None:
        """Writes the drawn records' ids to `folder`; raises ValueError if others are listed there."""
        from clipdistill_jax.data.protocol import write_selection

        cut = {name: count for name, count in self._data.cut("train").items() if count}
        if cut:
            logging.info("training texts that lost words, by who reads them: %s", cut)
        write_selection(self.selection(stage, seed), folder / "training_examples.json")

    def train_batches(
        self, stage: Stage, start: int, seed: int, mesh: Mesh
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's rows of the batches of steps `start`, `start` + 1, ..."""
        settings = stage.config
        index, count = process_parts(mesh)
        wanted = stage.system.example(stage.name, 1)
        batches = self._data.batches(
            start,
            batch_size=settings["batch_size"],
            seed=seed,
            selection=self.selection(stage, seed),
            images="image" in wanted,
            clip="clip_tokens" in wanted,
            class_probs="class_probs" in wanted,
            process_index=index,
            process_count=count,
        )
        unused = {"region_classes"} - wanted.keys()
        return ({name: x for name, x in batch.items() if name not in unused} for batch in batches)

    def train_sizes(self, stage: Stage, seed: int) -> dict[str, Any]:
        """Images and items of the training split, or the ids of those that the stage's protocol draws."""
        loaded = self._data.split("train")
        items, _ = loaded.selected(self.selection(stage, seed))
        if len(items) == len(loaded):
            return {"images": len(loaded.image_names), "texts": len(loaded)}
        return {"images": np.unique(loaded.image[items]), "texts": items}

    def cache_inputs(self, stage: Stage) -> dict[str, Callable[[np.ndarray], Iterable[Mapping[str, Any]]]]:
        """Batches of training images and texts by id [batches, b]; -1 fills a batch."""
        return {
            "images": lambda ids: self._data.image_batches("train", ids),
            "texts": lambda ids: self._data.text_batches("train", ids),
        }

    def identity(self, stage: Stage) -> dict[str, str | int]:
        """What a frozen model's vectors of the training split depend on, beside the model."""
        return {"data": self._data.fingerprint("train")}

    def clip_pairs(self, stage: Stage, mesh: Mesh) -> Iterator[Mapping[str, np.ndarray]]:
        """The validation split as CLIP reads it, for SNLI-VE's anchors."""
        index, count = process_parts(mesh)
        size = stage.config["eval_batch_size"]
        return self._data.eval_batches(
            "validation", batch_size=size, images=True, clip=True, process_index=index, process_count=count
        )

    def clip_answers(self) -> Any:
        """VQA's answers as CLIP reads them (`data.text.Tokens`)."""
        from clipdistill_jax.distill.confidence import answer_prompts

        prompts = answer_prompts(self._data.answers.answers, self._settings["answer_prompt"])
        return self._clip.encode(prompts, self._settings["clip_tokens"])

    def answer_names(self) -> tuple[str, ...]:
        """What an answer's index stands for: SNLI-VE's labels, VQA's vocabulary; VCR's have no names."""
        from clipdistill_jax.data.formats.snli_ve import LABELS

        if self._data.answers is not None:
            return self._data.answers.answers
        return LABELS if self._settings["format"] == "snli_ve" else ()

    def split(self, name: str, stage: Stage, mesh: Mesh) -> QuestionSplit:
        """A split as the evaluator wants it."""
        index, count = process_parts(mesh)
        about = self.describe(name)
        drop = {"region_classes", "labelled", "label", "image_id"}
        drop -= {"labelled"} if self._data.answers is not None else set()

        def batches() -> Iterator[dict[str, np.ndarray]]:
            size = stage.config["eval_batch_size"]
            parts = {"batch_size": size, "process_index": index, "process_count": count}
            for batch in self._data.eval_batches(name, **parts):
                yield {key: x for key, x in batch.items() if key not in drop}

        fields = {key: about[key] for key in ("kinds", "record_ids", "categories", "labels")}
        return QuestionSplit(batches=batches, **fields)

    def describe(self, split: str) -> dict[str, np.ndarray]:
        """What a report needs, an entry an item; see `QuestionData.describe`."""
        if split not in self._described:  # it reads the whole index, and every evaluation asks
            about = self._data.describe(split)
            self._described[split] = {name: x for name, x in about.items() if isinstance(x, np.ndarray)}
        return self._described[split]

    def listed(self, split: str) -> frozenset[str]:
        """Ids of all questions that the dataset lists in a split, also those that preparation left out."""
        left_out = self._data.manifest["splits"][split]["left_out"]
        return frozenset((*self._data.split(split).record_ids, *left_out))

    def choice_words(self, ids: Collection[int]) -> dict[int, tuple[str, list[tuple[str, ...]]]]:
        """By example_id of the training split: a name of the item, and the words of each of its choices."""
        from clipdistill_jax.data.questions.index import read_items
        from clipdistill_jax.data.questions.words import choice_words

        kinds, joiner = self._data.kinds, self._student.joiner
        return {
            i: (f"{item.record_id} ({item.kind})", choice_words(item, joiner))
            for i, item in enumerate(read_items(self._data.directory, "train", kinds))
            if i in ids
        }
