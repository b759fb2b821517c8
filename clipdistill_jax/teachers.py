"""The frozen models of a stage: their weights on the devices, what they are, and their cached vectors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.distill import cache
from clipdistill_jax.distill.choices import answer_vectors, similarities
from clipdistill_jax.distill.confidence import fit_anchors
from clipdistill_jax.distill.teacher import fingerprint
from clipdistill_jax.experiment import Config, Frozen, Stage
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states
from clipdistill_jax.weights import find_stage, read_clip, stage_variables


class Teachers(NamedTuple):
    """What a stage trains beside.

    Attributes:
      variables: {"teacher": ..., "clip": ...} on the devices, as the step takes them.
      fingerprints: of their weights, by name.
      caches: their vectors, where the stage caches.
    """

    variables: dict[str, Any]
    fingerprints: dict[str, str]
    caches: Sequence[cache.TeacherCache]


def load_teachers(
    stage: Stage, dataset: Any, mesh: Mesh, runs: Sequence[Path], cache_root: Path, seed: int
) -> Teachers:
    """Reads the frozen models of a stage and, where it caches, computes what is missing of their vectors.

    Args:
      stage: as built.
      dataset: whose training split is cached, or what the stage draws of it.
      mesh: of the run.
      runs: folders in which stages are looked for, see `weights.find_stage`.
      cache_root: the folder that holds caches; every host sees it.
      seed: of the run: what is drawn of the training split depends on it.

    Raises:
      FileNotFoundError: a model is not there.
      ValueError: its weights do not fit the config; a cache cannot be used.
    """
    variables, prints, caches = {}, {}, []
    for of, model in stage.teachers.items():
        read = _read(of, model, stage.config, runs)
        prints[of] = fingerprint(read)
        if "choices" in model.variables:  # made of the weights and the data, and rounded as the devices do
            read = {**read, "choices": _choices(model, read, stage, dataset, mesh)}
        states.check_same(read, model.variables)
        if model.cached:
            spec = _spec(stage, of, dataset, seed, prints[of])
            folder = spec.folder(cache_root)
            _build(stage, model, read, spec, folder, dataset, mesh)
            caches.append(cache.TeacherCache(folder, spec, of))
        variables[of] = _place(model.needed(read), model.needed(model.variables))
    return Teachers(variables, prints, caches)


def training_batches(
    stage: Stage, dataset: Any, teachers: Teachers, seed: int, mesh: Mesh, start: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """This process's batches from step `start` on, with the cached vectors of their examples."""
    batches = dataset.train_batches(stage, start, seed, mesh)
    return cache.join_cached(batches, teachers.caches) if teachers.caches else batches


def _read(of: str, model: Frozen, config: Config, runs: Sequence[Path]) -> Any:
    if of == "clip":
        own = {name: tree for name, tree in model.variables.items() if name != "choices"}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
        return read_clip(config["clip"], like, runs)
    return stage_variables(find_stage(config["teacher"], runs))


def _choices(model: Frozen, read: Any, stage: Stage, dataset: Any, mesh: Mesh) -> dict[str, np.ndarray]:
    """What CLIP's logits are made with: VQA's answers' vectors, or SNLI-VE's anchors; without labels."""
    placed = _place(read, {name: model.variables[name] for name in read})
    with jax.set_mesh(mesh):
        if "answers" in model.variables["choices"]:
            said = dataset.clip_answers()
            vectors = jax.jit(lambda v, tokens, mask: answer_vectors(model.module, v, tokens, mask))
            return {"answers": sharding.fetch(vectors(placed, said.tokens, said.token_mask))}
        found = similarities(
            model.module,
            placed,
            dataset.clip_pairs(stage, mesh),
            place=lambda batch: sharding.place_batch(batch, mesh),
            fetch=sharding.fetch,
        )
    return {"anchors": np.asarray(fit_anchors(found), np.float32)}


def _place(read: Any, like: Any) -> Any:
    return sharding.place_tree(read, jax.tree.map(lambda x: x.sharding, like))


def _spec(stage: Stage, of: str, dataset: Any, seed: int, print_: str) -> cache.CacheSpec:
    about = {"fingerprint": print_, "data": dataset.identity(stage)}
    return stage.teachers[of].cache_spec(**about, **dataset.train_sizes(stage, seed))


def _build(
    stage: Stage, model: Frozen, read: Any, spec: cache.CacheSpec, folder: Path, dataset: Any, mesh: Mesh
) -> None:
    index, count = sharding.process_parts(mesh)
    placed = _place(read, model.variables)
    with jax.set_mesh(mesh):
        vectors = stage.system.vectors(
            model.module,
            placed,
            spec,
            **dataset.cache_inputs(stage),
            place=lambda batch: sharding.place_batch(batch, mesh),
            sharding=sharding.batch_sharding(mesh),
        )
        cache.build_cache(
            folder,
            spec,
            vectors,
            batch_size=stage.config["eval_batch_size"],
            process_index=index,
            process_count=count,
            agree=lambda value: sharding.first_host_says(value),
        )
