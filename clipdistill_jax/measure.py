"""Times a stage: its training step, its input pipeline, its evaluation. `benchmark` is the command.

Every function warms up first, measures `repeats` stretches of `steps` steps or batches, and returns json-able
numbers: a `Spread` where there is one a stretch.
"""

import dataclasses
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax import commands
from clipdistill_jax.dataset import Dataset, open_dataset
from clipdistill_jax.devices import peak_flops
from clipdistill_jax.evaluate.evaluator import RetrievalEvaluator, Split
from clipdistill_jax.experiment import (
    MODELS,
    Config,
    Frozen,
    Stage,
    build_stage,
    cached_example,
    example_batch,
    plain,
    stage_config,
    student_variables,
)
from clipdistill_jax.report.sizes import flops
from clipdistill_jax.systems import make_system
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states
from clipdistill_jax.train.meter import Meter
from clipdistill_jax.train.prefetch import Placed, Prefetcher

WARM_UP = 2  # steps
# The standard figure of the pipeline: clips of 12 JPEG frames of 224 x 224.
STANDARD_FRAMES, STANDARD_SIZE, STANDARD_CLIPS = 12, 224, 256

Spread = dict[str, float]  # median, min, max
Report = dict[str, Any]


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Training:
    """A stage with random weights that trains for a while and is timed."""

    def __init__(self, config: Config, stage: Stage, mesh: Mesh) -> None:
        self.stage, self._mesh = stage, mesh
        key = jax.random.key(config["seed"])
        self.state = states.create(stage.init, stage.optimizer, mesh, key, **stage.placement)
        batch = example_batch(config, stage.name)
        self._frozen = {}
        for name, model in stage.teachers.items():
            with jax.set_mesh(mesh):
                init = jax.jit(
                    lambda model=model, name=name: model.needed(
                        stage.system.frozen(model.module, stage.config, name, batch)[1]
                    ),
                    out_shardings=jax.tree.map(lambda x: x.sharding, model.needed(model.variables)),
                )
                self._frozen[name] = init()

    def run(self, feed: Iterator[Placed], steps: int) -> dict[str, float]:
        """Trains one step untimed and `steps` timed; the meter's report of the latter."""
        meter = Meter(self.stage.system.unit)
        with jax.set_mesh(self._mesh):
            for step in range(1 + steps):
                with meter.waiting():
                    batch = next(feed)
                self.state, metrics = self.stage.step(self.state, self._frozen, batch.arrays)
                meter.add(step, batch.ids, batch.size, metrics)
            return meter.report()


def random_batch(
    config: Config, stage: Stage, size: int, vocab: Mapping[str, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch of noise in the shapes of a stage, without padding; rows of one process."""
    rng = np.random.default_rng(seed)
    entries = min(vocab[model] for model in MODELS if model in vocab)  # what every tokenizer has
    batch = {key: np.array(value) for key, value in example_batch(config, stage.name, size).items()}
    for name, value in batch.items():
        if value.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, value.shape, np.uint8)
        elif value.dtype == np.float32 and name != "image_size":
            batch[name] = rng.random(value.shape, np.float32)
        elif name.endswith("_id"):
            batch[name] = np.arange(size, dtype=np.int32)
        elif name.endswith("tokens"):
            value[:] = rng.integers(0, entries, value.shape, np.int32)
        elif name.endswith("word_ids"):
            value[:] = np.arange(value.shape[-1]) - 1
            value[..., -1] = -1  # BOS has -1 by the line above
    for key, value in cached_example(stage, size).items():
        batch[key] = ~value if value.dtype == bool else rng.normal(size=value.shape).astype(value.dtype)
    return batch


def model_flops(config: Config, stage: Stage) -> dict[str, float]:
    """FLOPs that one step's batch asks of the models: {"student": 3 forward passes, "teacher": 1, or 0}.

    A backward pass counts as two forward passes; what rematerialisation computes again counts nothing.
    """
    system = stage.system
    online: Config = {**stage.config, "cache": False, "chunks": 1}
    whole = make_system(
        {**plain(config), "stages": {**plain(config["stages"]), stage.name: online}}, system.vocab
    )
    batch = jax.eval_shape(lambda: whole.example(stage.name, stage.config["batch_size"]))
    params = stage.template.params["student"], stage.template.model_state
    student = whole.student(stage.module, online)

    def asked(of: str, model: Frozen) -> float:
        teach = whole.teach(model.module, online, of, model.layers)
        return flops(teach, model.variables, batch)

    return {
        "student": 3 * flops(lambda *args: student(*args)[0], *params, batch, jax.random.key(0)),
        "teacher": sum(asked(of, model) for of, model in stage.teachers.items()),
    }


def utilisation(flops_per_step: float, ms_per_step: Spread, peak: float | None) -> Spread | None:
    """Model FLOPs a second over the `peak` of all devices; None where that is not known."""
    if peak is None:
        return None
    return spread(flops_per_step / (ms / 1000) / peak for ms in ms_per_step.values())


def peak_memory() -> Report:
    """{"bytes", "of"}: a device's peak so far, or the process's where the backend keeps no count."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "a device"}
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": used, "of": "the process (resident; this backend counts none of its own)"}


def measure_step(config: Config, name: str, mesh: Mesh, repeats: int, steps: int) -> Report:
    """Times a stage's step, and in turn with it the same stage without teacher, if it has one."""
    vocab, size = commands.vocab(config), stage_config(config, name)["batch_size"]
    rows = size // sharding.process_parts(mesh)[1]
    stage = build_stage(config, name, mesh, vocab)
    batches = [random_batch(config, stage, rows, vocab, seed) for seed in range(2)]
    feed = itertools.cycle(
        Placed(sharding.place_batch(batch, mesh), size, batch["example_id"]) for batch in batches
    )
    runs = [Training(config, stage, mesh)]
    runs[0].run(feed, WARM_UP)
    memory = peak_memory()  # before there is a second state
    if stage.teachers:
        plain_config = without_teacher(config, name)
        runs.append(Training(plain_config, build_stage(plain_config, name, mesh, vocab), mesh))
        runs[1].run(feed, WARM_UP)
    ms: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats):
        for i in range(len(runs))[:: 1 if repeat % 2 else -1]:
            ms[i].append(1000 / runs[i].run(feed, steps)["speed/steps_per_sec"])
    work, peak = model_flops(config, stage), peak_flops(mesh.devices.flat[0].device_kind)
    needed, times = sum(work.values()), spread(ms[0])
    return {
        "batch_size": size,
        "dtype": config[stage.config["model"]]["dtype"],
        "ms_per_step": times,
        "unit": stage.system.unit,
        f"{stage.system.unit}_per_sec": spread(1000 * size / t for t in ms[0]),
        "model_flops_per_step": work,
        "flops_per_sec": spread(1000 * needed / t for t in ms[0]),
        "peak_flops_per_device": peak,
        "model_flop_utilisation": utilisation(needed, times, peak and peak * mesh.size),
        "peak_memory": memory,
        "plain_ms_per_step": spread(ms[1]) if len(ms) > 1 else None,
        "distilled_over_plain": spread(a / b for a, b in zip(*ms, strict=True)) if len(ms) > 1 else None,
    }


def without_teacher(config: Config, name: str) -> Config:
    """The config with the stage's teacher and terms taken out."""
    changed = plain(config)
    changed["stages"][name] |= {"teacher": "", "clip": "", "terms": {}}
    return changed


def measure_input(config: Config, name: str, mesh: Mesh, workdir: Path, repeats: int, steps: int) -> Report:
    """Times the pipeline of a config alone, and what a training run waits for it. Prepares the data."""
    dataset = open_dataset(config, workdir)
    stage = build_stage(config, name, mesh, dataset.vocab)
    alone = _pipeline_rate(dataset, stage, config["seed"], mesh, repeats, steps)
    training = Training(config, stage, mesh)
    with Prefetcher(dataset.train_batches(stage, 0, config["seed"], mesh), mesh) as feed:
        training.run(feed, WARM_UP)
        reports = [training.run(feed, steps) for _ in range(repeats)]
    return {
        "batch_size": stage.config["batch_size"],
        "num_frames": stage.config["num_frames"],
        "image_size": config["data"]["image_size"],
        "unit": stage.system.unit,
        f"{stage.system.unit}_per_sec": alone,
        f"training_{stage.system.unit}_per_sec": spread(
            report[f"speed/{stage.system.unit}_per_sec"] for report in reports
        ),
        "data_wait": spread(report["speed/data_wait"] for report in reports),
    }


def measure_standard_input(
    config: Config, name: str, mesh: Mesh, workdir: Path, repeats: int, steps: int
) -> Report:
    """Times the pipeline on clips of 12 JPEG frames of 224 x 224 pixels, written to `workdir` once."""
    frames, side = STANDARD_FRAMES, STANDARD_SIZE
    changed = plain(config)
    changed["world"] = {
        **{"train": STANDARD_CLIPS, "train_small": 1, "validation": 1, "test": 1, "twin_pairs": 0},
        **{"captions": 1, "size": side, "fps": 1, "seconds": frames - 1},
    }
    changed["data"] |= {
        **{"source": "", "prepared": "", "train": "9k", "fps": 1.0, "tokenizer": "train:600"},
        **{"max_frames": frames, "num_frames": frames, "image_size": side, "stored_size": side},
    }
    dataset = open_dataset(changed, workdir / "standard_input")
    stage = build_stage(config, name, mesh, dataset.vocab)
    settings = {"num_frames": frames, "max_clips": 0, "captions": "one", "frame_sampling": "uniform"}
    stage = dataclasses.replace(stage, config={**plain(stage.config), **settings})
    return {
        "batch_size": stage.config["batch_size"],
        "num_frames": frames,
        "image_size": side,
        "unit": stage.system.unit,
        "clips_per_sec": _pipeline_rate(dataset, stage, config["seed"], mesh, repeats, steps),
    }


def _pipeline_rate(dataset: Dataset, stage: Stage, seed: int, mesh: Mesh, repeats: int, steps: int) -> Spread:
    batches, rates = dataset.train_batches(stage, 0, seed, mesh), []
    for repeat in range(1 + repeats):
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        if repeat:  # the first fills the buffers
            rates.append(steps * stage.config["batch_size"] / (time.perf_counter() - start))
    if hasattr(batches, "close"):
        batches.close()
    return spread(rates)


def measure_eval(config: Config, name: str, mesh: Mesh, repeats: int, steps: int) -> Report:
    """Times the evaluation of a stage's model on `steps` batches of random clips and as many of captions.

    Raises:
      ValueError: the stage does not retrieve.
    """
    vocab = commands.vocab(config)
    stage = build_stage(config, name, mesh, vocab)
    if stage.system.unit != "clips":
        raise ValueError(f"eval times retrieval, and stage {name!r} learns {stage.system.unit}: use `step`")
    state = Training(config, stage, mesh).state
    variables = student_variables(state)
    size = stage.config["eval_batch_size"]
    batch = random_batch(config, stage, size // sharding.process_parts(mesh)[1], vocab)
    marks: list[float] = []

    def batches(*keys: str) -> Iterator[dict[str, np.ndarray]]:
        marks.append(time.perf_counter())
        for _ in range(steps):
            yield {key: batch[key] for key in (*keys, "mask")}
        marks.append(time.perf_counter())  # the last batch is on the host again by now

    split = Split(
        clips=lambda: batches("frames", "frame_mask"),
        texts=lambda: batches("tokens", "token_mask", "word_ids"),
        clip_of_text=np.arange(steps * size, dtype=np.int32),
    )
    evaluator = RetrievalEvaluator(stage.module, mesh)
    seconds = []
    for _ in range(1 + repeats):
        marks.clear()
        evaluator.scores(variables, split)
        seconds.append(np.diff([*marks, time.perf_counter()]))
    clips, _, texts, matrix = np.array(seconds[1:]).T.tolist()
    return {
        "clips": steps * size,
        "clips_per_sec": spread(steps * size / t for t in clips),
        "captions_per_sec": spread(steps * size / t for t in texts),
        "ms_per_query_matrix": spread(1000 * t for t in matrix),
    }
