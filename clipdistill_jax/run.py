"""Runs the stages of a config: data, weights, training, evaluation, results."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.dataset import open_dataset
from clipdistill_jax.distill.teacher import fingerprint
from clipdistill_jax.experiment import Config, Stage, build_stage, plain, stage_config, student_variables
from clipdistill_jax.report.sizes import model_sizes
from clipdistill_jax.teachers import load_teachers, training_batches
from clipdistill_jax.train import checkpoint, sharding
from clipdistill_jax.train import state as states
from clipdistill_jax.train.loop import LoopConfig, train
from clipdistill_jax.train.run_folder import run_folder
from clipdistill_jax.train.writers import (
    ConsoleWriter,
    JsonlWriter,
    MetricWriter,
    MultiWriter,
    TensorBoardWriter,
    on_first_host,
)
from clipdistill_jax.weights import STAGE, find_stage, stage_variables

RESULT = "result.json"
CACHE = "teacher_cache"


def run_stages(config: Config, workdir: Path) -> dict[str, dict[str, Any]]:
    """Runs every stage in order and returns their results; a stage that is done is not run again.

    `config.base` is the folder of another run: its data is used, and the stages that it has finished.

    What a stage leaves in `workdir/STAGE`: config.json, launches.jsonl, checkpoints/, metrics.jsonl,
    tensorboard/, scores.npz (of the test split), words.npz (of a stage that chooses words) and, written last,
    result.json.
    """
    mesh = sharding.make_mesh(**plain(config["mesh"]))
    runs = run_folders(config, workdir)
    dataset = sharding.first_host_first(lambda: open_dataset(config, runs[-1]))
    results: dict[str, dict[str, Any]] = {}
    for name in stage_order(config):
        key = _key(config, name, results)
        done = _finished(config, name, key, runs)
        if done is not None:
            logging.info("stage %s is done: %s", name, done["folder"])
            results[name] = done
            continue
        stage = build_stage(config, name, mesh, dataset.vocab)
        results[name] = run_stage(config, stage, dataset, mesh, runs, key)
    return results


def run_folders(config: Config, workdir: Path) -> tuple[Path, ...]:
    """Where stages are looked for: the run's folder and then its `base`, whose data it uses."""
    base = config.get("base", "")
    return (workdir, Path(base).expanduser()) if base else (workdir,)


def _finished(config: Config, name: str, key: str, runs: Sequence[Path]) -> dict[str, Any] | None:
    """The result of a stage that is done, here or in the base. A base's may have had another seed."""
    for run, field, wanted in zip(runs, ("key", "origin"), (key, _origin(config, name)), strict=False):
        file = run / name / RESULT
        if file.exists():
            done = json.loads(file.read_text())
            if done[field] == wanted:
                return {**done, "folder": str(file.parent)}
            if field == "origin":
                raise ValueError(
                    f"{file.parent} is stage {name!r} of another recipe: rename the stage here, or take "
                    "another base"
                )
    return None


def stage_order(config: Config) -> list[str]:
    """The stages, each after those that it starts or learns from, else in the config's order.

    Raises:
      ValueError: stages wait for each other, or for one that is not there.
    """
    order: list[str] = []

    def visit(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            raise ValueError(f"stages wait for each other: {' -> '.join((*waiting, name))}")
        for other in _needs(stage_config(config, name)):
            visit(other, (*waiting, name))
        if name not in order:
            order.append(name)

    for name in config["stages"]:
        visit(name, ())
    return order


def _needs(stage: Config) -> list[str]:
    given = [*plain(stage["init"]).values(), stage["clip"]]
    sources = [source for source in given if isinstance(source, str)]
    started = [source.removeprefix("stage:") for source in sources if source.startswith("stage:")]
    return [name for name in (*started, stage["teacher"]) if name]


# Fields that change how long a stage trains and what it writes, but not what a step does.
_CADENCE = (
    "title",
    "steps",
    "select",
    "eval_every",
    "log_every",
    "save_every",
    "save_minutes",
    "keep",
    "workers",
)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _recipe(config: Config, name: str) -> dict[str, Any]:
    """What a step of a stage depends on, beside the stages before it."""
    stage = plain(config["stages"][name])
    others = (*_CADENCE, *(["student_tokenizer"] if stage["model"] == "teacher" else []))
    return {
        "stage": {field: value for field, value in stage.items() if field not in _CADENCE},
        "model": plain(config[stage["model"]]),
        "data": {field: value for field, value in plain(config["data"]).items() if field not in others},
        "world": plain(config["world"]),
    }


def _key(config: Config, name: str, results: Mapping[str, Any]) -> str:
    """What a stage's result depends on: its recipe, its length, the stages before it."""
    stage = stage_config(config, name)
    before = {other: results[other]["key"] for other in _needs(stage)}
    return _hash([_recipe(config, name), config["seed"], stage["steps"], stage["select"], before])


def _origin(config: Config, name: str) -> str:
    """The same but for the seeds."""
    stage = stage_config(config, name)
    before = {other: _origin(config, other) for other in _needs(stage)}
    return _hash([_recipe(config, name), stage["steps"], stage["select"], before])


def run_stage(
    config: Config, stage: Stage, dataset: Any, mesh: Mesh, runs: Sequence[Path], key: str
) -> dict[str, Any]:
    """Trains a stage, evaluates the selected checkpoint on the test split and writes its result."""
    folder, settings = run_folder(runs[0] / stage.name, plain(config)), stage.config
    recipe, seed = _recipe(config, stage.name), config["seed"]
    # First, since a weights file that does not fit is found in seconds, and a cache may take hours.
    # In a list, to be handed over: a run that goes on should not hold it beside the state that it reads.
    start = [initial_state(config, stage, mesh, runs)]
    if (source := settings["init"].get("model", "")).startswith(STAGE):
        dataset.check_answers(find_stage(source.removeprefix(STAGE), runs))
    if jax.process_index() == 0:
        dataset.note_selection(stage, seed, folder)
    teachers = load_teachers(stage, dataset, mesh, runs, runs[-1] / CACHE, seed)
    identity: dict[str, Any] = {"recipe": _hash([recipe, seed]), "data": _hash(dataset.identity(stage))}
    identity |= {"teacher": None, "clip": None, **teachers.fingerprints}
    evaluator = stage.system.evaluator(stage.module, settings, mesh)

    final = dataset.final_split
    judged: dict[int, Any] = {}  # by step, the last validation, where that is the split of the results

    def evaluate(state: states.TrainState, step: int) -> dict[str, float]:
        found = evaluator(student_variables(state), dataset.split("validation", stage, mesh))
        if final == "validation":
            judged.clear()
            judged[step] = found
        return {f"validation/{name}": value for name, value in found[0].items()}

    def batches(start: int) -> Iterator[Mapping[str, np.ndarray]]:
        return training_batches(stage, dataset, teachers, seed, mesh, start)

    checkpointer = checkpoint.Checkpointer(
        folder / "checkpoints",
        keep=settings["keep"],
        best_metric=settings["select"] or None,
        identity=identity,
        info={"stage": stage.name, "key": key},
    )
    logging.info("stage %s: %d steps of %d examples", stage.name, settings["steps"], settings["batch_size"])
    started = time.monotonic()
    finished = train(
        start.pop(),
        stage.step,
        batches,
        LoopConfig(
            steps=settings["steps"],
            shapes=dataset.shapes,
            unit=stage.system.unit,
            log_every=settings["log_every"],
            eval_every=settings["eval_every"] or None,
            save_every=settings["save_every"] or None,
            save_minutes=settings["save_minutes"] or None,
        ),
        mesh,
        frozen=teachers.variables,
        writer=on_first_host(lambda: _writer(folder, settings, stage.system.unit)),
        checkpointer=checkpointer,
        evaluate=evaluate if evaluator and "validation" in dataset.splits else None,
    )
    seconds = time.monotonic() - started
    selected = checkpoint.Checkpointer(folder / "checkpoints", best_metric=settings["select"] or None)
    step = selected.best() or settings["steps"]
    selected.close()
    variables = stage_variables(folder, step)
    # Where the training had them: what the validation compiled serves the test split too.
    where = jax.tree.map(lambda x: x.sharding, student_variables(stage.template))
    placed = sharding.place_tree(variables, where)
    metrics, scores = {}, {}
    if evaluator:
        metrics, scores = judged.get(step) or evaluator(placed, dataset.split(final, stage, mesh))
    result = {
        "stage": stage.name,
        "key": key,
        "origin": _origin(config, stage.name),
        "seed": seed,
        "step": step,
        "seconds": seconds,
        "fingerprint": fingerprint(variables),
        "answers": dataset.answers,
        "validation": finished.metrics,
        "split": final,
        "test": metrics,
        "sizes": model_sizes(stage.module, config, stage.name),
    }
    if jax.process_index() == 0:
        arrays = scores if isinstance(scores, dict) else {"scores": scores}
        arrays = {**arrays, **dataset.describe(final)} if evaluator else {}
        np.savez_compressed(folder / "scores.npz", **arrays)
    if "tokens" in settings["terms"]:
        from clipdistill_jax.report.chosen_words import note_words

        note_words(folder / "words.npz", stage, dataset, teachers.variables, next(batches(0)), mesh)
    if jax.process_index() == 0:
        (folder / RESULT).write_text(json.dumps(result, indent=1))
    sharding.wait_for_all()  # the next stage may read it
    return {**result, "folder": str(folder)}


def initial_state(config: Config, stage: Stage, mesh: Mesh, runs: Sequence[Path]) -> states.TrainState:
    """A stage's state at step 0, with the weights that its `init` names laid over the random ones."""
    key = jax.random.key(config["seed"])
    state = states.create(stage.init, stage.optimizer, mesh, key, **stage.placement)
    init = plain(stage.config["init"])
    if not any(init.values()):
        return state
    params, model_state = sharding.fetch((state.params, state.model_state))
    student, model_state = stage.system.start(init, params["student"], model_state, runs)
    return states.with_params(state, {**params, "student": student}, model_state)


def _writer(folder: Path, settings: Config, unit: str) -> MetricWriter:
    shown = ["task_loss", *(f"{name}_loss" for name in settings["terms"])]
    return MultiWriter(
        [
            ConsoleWriter(keys=shown if settings["terms"] else (), unit=unit),
            JsonlWriter(folder / "metrics.jsonl"),
            TensorBoardWriter(folder / "tensorboard"),
        ]
    )
