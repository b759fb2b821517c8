"""Runs the stages of a config: data, weights, training, evaluation, results."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.dataset import Dataset, open_dataset
from clipdistill_jax.distill.teacher import fingerprint
from clipdistill_jax.evaluate.evaluator import RetrievalEvaluator
from clipdistill_jax.experiment import Config, Stage, build_stage, plain, stage_config
from clipdistill_jax.report.sizes import model_sizes
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
from clipdistill_jax.weights import read_initial, stage_variables

RESULT = "result.json"


def run_stages(config: Config, workdir: Path) -> dict[str, dict[str, Any]]:
    """Runs every stage in order and returns their results; a stage that is done is not run again.

    What a stage leaves in `workdir/STAGE`: config.json, launches.jsonl, checkpoints/, metrics.jsonl,
    tensorboard/, scores.npz (of the test split) and, written last, result.json.
    """
    mesh = sharding.make_mesh(**plain(config["mesh"]))
    dataset = open_dataset(config, workdir)
    results: dict[str, dict[str, Any]] = {}
    for name in stage_order(config):
        key = _key(config, name, results)
        file = workdir / name / RESULT
        if file.exists() and (done := json.loads(file.read_text()))["key"] == key:
            logging.info("stage %s is done: %s", name, file)
            results[name] = done
            continue
        stage = build_stage(config, name, mesh, dataset.vocab_size)
        results[name] = run_stage(config, stage, dataset, mesh, workdir, key)
    return results


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
    sources = plain(stage["init"]).values()
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
    return {
        "stage": {field: value for field, value in stage.items() if field not in _CADENCE},
        "model": plain(config[stage["model"]]),
        "data": {field: value for field, value in plain(config["data"]).items() if field not in _CADENCE},
        "world": plain(config["world"]),
        "seed": config["seed"],
    }


def _key(config: Config, name: str, results: Mapping[str, Any]) -> str:
    """What a stage's result depends on: its recipe, its length, the stages before it."""
    stage = stage_config(config, name)
    before = {other: results[other]["key"] for other in _needs(stage)}
    return _hash([_recipe(config, name), stage["steps"], stage["select"], before])


def run_stage(
    config: Config, stage: Stage, dataset: Dataset, mesh: Mesh, workdir: Path, key: str
) -> dict[str, Any]:
    """Trains a stage, evaluates the selected checkpoint on the test split and writes its result."""
    folder, settings = run_folder(workdir / stage.name, plain(config)), stage.config
    frozen: Any = None
    identity: dict[str, str | None] = {"recipe": _hash(_recipe(config, stage.name)), "teacher": None}
    if stage.teacher is not None:
        variables = stage_variables(workdir / settings["teacher"])
        identity["teacher"] = fingerprint(variables)
        states.check_same(variables, stage.frozen)
        frozen = sharding.place_tree(variables, jax.tree.map(lambda x: x.sharding, stage.frozen))
    evaluator = RetrievalEvaluator(stage.module, mesh)

    def evaluate(state: states.TrainState, step: int) -> dict[str, float]:
        metrics, _ = evaluator(_variables(state), dataset.split("validation", stage, mesh))
        return {f"validation/{name}": value for name, value in metrics.items()}

    checkpointer = checkpoint.Checkpointer(
        folder / "checkpoints",
        keep=settings["keep"],
        best_metric=settings["select"] or None,
        identity=identity,
        info={"stage": stage.name, "key": key},
    )
    logging.info("stage %s: %d steps of %d clips", stage.name, settings["steps"], settings["batch_size"])
    started = time.monotonic()
    finished = train(
        initial_state(config, stage, mesh, workdir),
        stage.step,
        lambda start: dataset.train_batches(stage, start, config["seed"], mesh),
        LoopConfig(
            steps=settings["steps"],
            log_every=settings["log_every"],
            eval_every=settings["eval_every"] or None,
            save_every=settings["save_every"] or None,
            save_minutes=settings["save_minutes"] or None,
        ),
        mesh,
        frozen=frozen,
        writer=on_first_host(lambda: _writer(folder, settings)),
        checkpointer=checkpointer,
        evaluate=evaluate if "validation" in dataset.splits else None,
    )
    seconds = time.monotonic() - started
    selected = checkpoint.Checkpointer(folder / "checkpoints", best_metric=settings["select"] or None)
    step = selected.best() or settings["steps"]
    selected.close()
    variables = stage_variables(workdir / stage.name, step)
    metrics, scores = evaluator(variables, dataset.split("test", stage, mesh))
    result = {
        "stage": stage.name,
        "key": key,
        "step": step,
        "seconds": seconds,
        "fingerprint": fingerprint(variables),
        "validation": finished.metrics,
        "test": metrics,
        "sizes": model_sizes(stage.module, config, stage.name),
    }
    if jax.process_index() == 0:
        arrays: dict[str, Any] = {"scores": scores, **dataset.describe("test")}
        np.savez_compressed(folder / "scores.npz", **arrays)
        (folder / RESULT).write_text(json.dumps(result, indent=1))
    return result


def initial_state(config: Config, stage: Stage, mesh: Mesh, workdir: Path) -> states.TrainState:
    """A stage's state at step 0, with the weights that its `init` names laid over the random ones."""
    key = jax.random.key(config["seed"])
    state = states.create(stage.init, stage.optimizer, mesh, key, **stage.placement)
    init = plain(stage.config["init"])
    if not any(init.values()):
        return state
    params, model_state = jax.device_get(jax.jit(stage.init)(key))
    student, model_state = read_initial(init, params["student"], model_state, workdir)
    return states.with_params(state, {**params, "student": student}, model_state)


def _writer(folder: Path, settings: Config) -> MetricWriter:
    shown = ["task_loss", *(f"{name}_loss" for name in settings["terms"])]
    return MultiWriter(
        [
            ConsoleWriter(keys=shown if settings["terms"] else ()),
            JsonlWriter(folder / "metrics.jsonl"),
            TensorBoardWriter(folder / "tensorboard"),
        ]
    )


def _variables(state: states.TrainState) -> dict[str, Any]:
    return {"params": state.eval_params["student"], **state.model_state}
