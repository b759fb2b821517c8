"""From a config to the pieces of a stage: model, teacher, terms, optimizer, step. No files, no data.

A stage trains one model: it names the model, where its weights start, the teacher if there is one, and how
long. Stages run in the order of the config; each may start from, or learn from, one before it. What depends
on the kind of data is its `systems.System`'s.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.distill import TERMS
from clipdistill_jax.distill.cache import CacheSpec
from clipdistill_jax.distill.confidence import ConfidenceGate
from clipdistill_jax.distill.objective import (
    WeightedTerm,
    check_terms,
    distillation_loss,
    init_terms,
    teacher_of,
)
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.systems import System, make_system
from clipdistill_jax.systems.system import MODELS, Config, Vocab, init_with_output, plain, stage_config
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states
from clipdistill_jax.train.optimizers import Optimizer, make_optimizer
from clipdistill_jax.train.schedules import make_schedule
from clipdistill_jax.train.step import make_train_step

__all__ = [
    "MODELS",
    "Config",
    "Frozen",
    "Stage",
    "build_stage",
    "cached_example",
    "example_batch",
    "plain",
    "raw_clip",
    "stage_config",
    "stage_module",
    "student_variables",
]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen model of a stage.

    Attributes:
      module: the model.
      features: shapes of what it gives for a batch of two.
      variables: shapes, dtypes and shardings of its variables.
      cached: its vectors come with the batch.
      layers: a term needs its feature maps, which are never cached.
      needed: the part of its variables (or of a tree like them) that a step reads.
      cache_spec: what its cache holds; see `System.cache_spec` for the arguments.
    """

    module: Any
    features: Features
    variables: Any
    cached: bool
    layers: bool
    needed: Callable[[Any], Any]
    cache_spec: Callable[..., CacheSpec]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, built: everything that its step is made of.

    Attributes:
      name: key in the config's `stages`.
      config: its part of the config.
      system: of its kind of data.
      module: the model that trains.
      terms: what it distils.
      teachers: the frozen models that its terms compare with: "teacher", "clip", both or none.
      init: key -> (params, model_state), of {"student": ..., "terms": ...}.
      optimizer: as built.
      template: the state's shapes, dtypes and shardings.
      step: jitted (state, {teacher: variables}, batch) -> (state, metrics).
    """

    name: str
    config: Config
    system: System
    module: Any
    terms: Sequence[WeightedTerm]
    teachers: Mapping[str, Frozen]
    init: Callable[[Any], tuple[Any, Any]]
    optimizer: Optimizer
    template: states.TrainState
    step: Any

    @property
    def placement(self) -> dict[str, Any]:
        """How the state lies on the mesh, for `state.create`."""
        return _placement(self.config)

    @property
    def frozen(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of what the step takes of the frozen models."""
        return {name: model.needed(model.variables) for name, model in self.teachers.items()}


def build_stage(config: Config, name: str, mesh: Mesh, vocab: Vocab | None = None) -> Stage:
    """Builds a stage of a config, and checks that it fits together, without touching a device.

    Args:
      config: of the run.
      name: of the stage.
      mesh: where it will run.
      vocab: see `System`; None leaves the models' own.

    Raises:
      ValueError: an unknown stage, model, term or field; a term that needs what a model does not give.
    """
    stage, system = stage_config(config, name), make_system(config, vocab)
    module = system.module(name)
    batch = system.example(name)
    own = system.own(batch, stage)
    terms = _terms(stage)
    seen = jax.eval_shape(lambda: init_with_output(module, own))[0]
    teachers = _teachers(system, stage, batch, terms, mesh)
    taught = {of: teacher.features for of, teacher in teachers.items()}
    check_terms(terms, seen, taught)

    def init(key: jax.Array) -> tuple[Any, Any]:
        # Only the terms' key depends on the teachers, so the student starts the same with and without them.
        variables = dict(module.init(jax.random.fold_in(key, 0), own, method="complete"))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (seen, taught))
        projections = init_terms(terms, jax.random.fold_in(key, 1), *zeros)
        return {"student": variables.pop("params"), "terms": projections}, variables

    shapes = jax.eval_shape(init, jax.random.key(0))
    optimizer = make_optimizer(plain(stage["optimizer"]), shapes[0], stage["steps"])
    template = states.abstract(init, optimizer, mesh, **_placement(stage))
    loss = distillation_loss(
        terms=terms,
        student=system.student(module, stage),
        teachers={
            of: system.teach(teacher.module, stage, of, teacher.layers) for of, teacher in teachers.items()
        },
        **system.objective(stage),
    )
    step = make_train_step(
        loss,
        optimizer,
        seed=config["seed"],
        shardings=states.shardings_of(template),
        ema_decay=stage["ema_decay"] or None,
        nan_policy=stage["nan_policy"],
    )
    return Stage(name, stage, system, module, terms, teachers, init, optimizer, template, step)


def _teachers(
    system: System, stage: Config, batch: Batch, terms: tuple[WeightedTerm, ...], mesh: Mesh
) -> dict[str, Frozen]:
    """The frozen models that the terms compare with, as far as the stage names them."""
    made = {}
    for of in dict.fromkeys(teacher_of(item.term) for item in terms):
        if not stage[of]:
            continue  # check_terms says which term misses it
        module = system.frozen_module(stage, of)
        features, variables = jax.eval_shape(
            lambda module=module, of=of: system.frozen(module, stage, of, batch)
        )
        placed = sharding.infer_sharding(variables, mesh, *_rules(stage))
        layers = any("layers" in t.term.needs for t in terms if teacher_of(t.term) == of)  # type: ignore[attr-defined]
        made[of] = Frozen(
            module,
            features,
            sharding.shape_structs(variables, placed),
            cached=bool(stage["cache"]),
            layers=layers,
            needed=partial(system.needed, module, stage, layers),
            cache_spec=partial(system.cache_spec, module, stage, of, features),
        )
    return made


def stage_module(config: Config, name: str, vocab: Vocab | None = None) -> Any:
    """The model that a stage trains; `vocab` as in `build_stage`."""
    return make_system(config, vocab).module(name)


def example_batch(config: Config, name: str, size: int = 2) -> Batch:
    """A batch of zeros in the shapes of a stage; every mask is True."""
    return make_system(config).example(name, size)


def raw_clip(config: Config, vocab: Vocab | None = None) -> DualEncoder:
    """The teacher's towers without a temporal head."""
    return make_system(config, vocab).frozen_module({}, "clip")


def student_variables(state: states.TrainState) -> dict[str, Any]:
    """The model's variables in a state: the parameters' average where one is kept."""
    return {"params": state.eval_params["student"], **state.model_state}


def cached_example(stage: Stage, size: int) -> Batch:
    """Zeros in the shapes of the cached vectors that a stage's batches carry; empty where none do."""
    made: Batch = {}
    for of, teacher in stage.teachers.items():
        if teacher.cached:
            none = dict.fromkeys(stage.system.cached_kinds, 0)
            spec = teacher.cache_spec(fingerprint="", data={}, **none)
            made |= spec.zeros(size, of)
    return made


def _terms(stage: Config) -> tuple[WeightedTerm, ...]:
    made = []
    try:
        gate = ConfidenceGate(**stage["gate"]) if stage["gate"] else None
    except TypeError as error:
        raise ValueError(f"gate: {error}") from error
    for name, spec in plain(stage["terms"]).items():
        if name not in TERMS:
            raise ValueError(f"stage term {name!r} is not one of {', '.join(TERMS)}")
        weight = make_schedule(spec.pop("weight"), stage["steps"])
        try:
            made.append(WeightedTerm(name, TERMS[name](**spec), weight, gate))
        except TypeError as error:
            raise ValueError(f"term {name!r}: {error}") from error
    return tuple(made)


def _rules(stage: Config) -> tuple[list[sharding.Rule], int]:
    return [(regex, tuple(spec)) for regex, spec in stage["sharding_rules"]], stage["fsdp_min_size"]


def _placement(stage: Config) -> dict[str, Any]:
    rules, size = _rules(stage)
    return {"rules": rules, "fsdp_min_size": size, "ema": bool(stage["ema_decay"])}
