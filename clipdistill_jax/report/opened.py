"""Finished stages, opened again: their models, each with the test split as it reads it."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipdistill_jax.dataset import Dataset, open_dataset
from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.experiment import Config, Stage, build_stage, example_batch, plain, raw_clip
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.report import table
from clipdistill_jax.run import RESULT, run_folders, stage_order
from clipdistill_jax.train import sharding
from clipdistill_jax.weights import STAGE, read_clip, stage_variables

BATCH = 16  # clips or captions at once: every layer of two models is there with them
CLIP = "raw CLIP"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model and the test split as it reads it.

    Attributes:
      label: what figures call it.
      index: its stage's place among those opened, which sets its colour.
    """

    label: str
    index: int
    module: DualEncoder
    variables: Any
    split: Split

    @functools.cached_property
    def encode_video(self) -> Any:
        """jitted: (variables, batch) -> Features of its clips."""

        def encode(variables: Any, batch: Batch) -> Features:
            frames = batch["frames"], batch["frame_mask"]
            seen: Any = self.module.apply(variables, *frames, method="encode_video")
            return seen

        return jax.jit(encode)

    @functools.cached_property
    def encode_text(self) -> Any:
        """jitted: (variables, batch) -> Features of its captions."""

        def encode(variables: Any, batch: Batch) -> Features:
            tokens = batch["tokens"], batch["token_mask"], batch["word_ids"]
            said: Any = self.module.apply(variables, *tokens, method="encode_text")
            return said

        return jax.jit(encode)


class Opened:
    """Stages of a run or of several (the rows of a sweep), on one device. All models see the same frames.

    A stage goes by its folder relative to `workdir`: its name in a run, such as ROW/seed0/student in a sweep.

    Attributes:
      workdir: under which the stages lie.
      stages: their parts of the configs; `teacher` and "stage:NAME" in `clip` are such folders too.
      config: of the last stage named.
      results: of the stages named, and of all that have finished in their runs.
      test: what `Dataset.describe` says of the test split.
    """

    def __init__(self, workdir: Path, names: Sequence[str]) -> None:
        """Opens stages.

        Args:
          workdir: a folder.
          names: of stages under it. Frames are counted as the last of them has them.

        Raises:
          FileNotFoundError: one is not there or has not finished.
        """
        self.workdir = workdir
        self.stages: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self._configs: dict[str, Config] = {}
        self._datasets: dict[str, Dataset] = {}
        self._mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
        for name in names:
            file = workdir / name / "config.json"
            if not file.exists():
                raise FileNotFoundError(f"{file.parent} is not the folder of a stage: it has no config.json")
            self._add_run(json.loads(file.read_text()), file.parent.parent)
            self._check(name)
        self.config = self._configs[names[-1]]
        self._frames = self.stages[names[-1]]["num_frames"] or self.config["data"]["num_frames"]
        self._last = names[-1]
        self.test = self._dataset(names[-1]).describe("test")

    def _add_run(self, config: Config, run: Path) -> None:
        """Adds the finished stages of a run, those of the run that it is based on among them."""
        folders = {}
        for name in stage_order(config):
            places = [folder / name for folder in run_folders(config, run)]
            folder = next((place for place in places if (place / RESULT).exists()), places[-1])
            folders[name] = os.path.relpath(folder, self.workdir)

        for name, key in folders.items():
            file = self.workdir / key / RESULT
            if key in self.results or not file.exists():
                continue
            stage = dict(config["stages"][name])
            stage["teacher"] = folders.get(stage["teacher"], stage["teacher"])
            clip = stage.get("clip") or ""
            if clip.startswith(STAGE):
                clip = STAGE + folders.get(clip.removeprefix(STAGE), clip.removeprefix(STAGE))
            self.stages[key] = {**stage, "clip": clip}
            self.results[key], self._configs[key] = json.loads(file.read_text()), config

    def _check(self, name: str) -> None:
        if name not in self.results:
            raise FileNotFoundError(f"{self.workdir / name} has no {RESULT}: no stage, or one not finished")

    def label(self, name: str) -> str:
        """A stage's title, with its name where another stage has the same."""
        title = table.title(self.stages, name)
        shared = sum(table.title(self.stages, other) == title for other in self.results) > 1
        return f"{title} ({name})" if shared else title

    def stage(self, name: str) -> Model:
        """A stage's model with its selected checkpoint.

        Raises:
          FileNotFoundError: it has not finished.
          ValueError: it has other test data than the other stages.
        """
        self._check(name)
        config, dataset = self._configs[name], self._dataset(name)
        built = build_stage(config, Path(name).name, self._mesh, dataset.vocab)
        return Model(
            label=self.label(name),
            index=list(self.results).index(name),
            module=built.module,
            variables=stage_variables(self.workdir / name),
            split=self._split(name, built, built.config["model"]),
        )

    def clip(self, source: str) -> Model:
        """The teacher's towers without a temporal head, with weights from `weights.read_source`."""
        config, dataset = self._configs[self._last], self._dataset(self._last)
        module = raw_clip(config, dataset.vocab)
        batch, run = example_batch(config, Path(self._last).name), self.workdir
        if source.startswith(STAGE):
            name = source.removeprefix(STAGE)
            self._check(name)
            run, source = (self.workdir / name).parent, STAGE + Path(name).name
        like = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))
        variables = read_clip(source, like, (run,))
        built = build_stage(config, Path(self._last).name, self._mesh, dataset.vocab)
        split = self._split(self._last, built, "teacher")
        return Model(CLIP, len(self.results), module, variables, split)

    def _dataset(self, name: str) -> Dataset:
        """What a stage's data section opens; the same section of the same run is opened once."""
        config = self._configs[name]
        run = run_folders(config, (self.workdir / name).parent)[-1]
        key = json.dumps([str(run), plain(config["data"])], sort_keys=True)
        if key not in self._datasets:
            self._datasets[key] = open_dataset(config, run)
        return self._datasets[key]

    def _split(self, name: str, stage: Stage, model: str) -> Split:
        dataset = self._dataset(name)
        test = dataset.describe("test")
        if not all(np.array_equal(test[key], self.test[key]) for key in ("video_ids", "captions")):
            raise ValueError(f"{name} and {self._last} have other test data, so they cannot be compared")
        ours = {"num_frames": self._frames, "eval_batch_size": BATCH, "model": model}
        changed = dataclasses.replace(stage, config={**plain(stage.config), **ours})
        return dataset.split("test", changed, self._mesh)
