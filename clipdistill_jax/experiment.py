"""From a config to the pieces of a stage: model, teacher, terms, optimizer, step. No files, no data.

A stage trains one model: it names the model, where its weights start, the teacher if there is one, and how
long. Stages run in the order of the config; each may start from, or learn from, one before it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.distill import TERMS
from clipdistill_jax.distill.objective import WeightedTerm, check_terms, distillation_loss, init_terms
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.tasks.retrieval import retrieval_task
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states
from clipdistill_jax.train.accumulate import apply_in_chunks
from clipdistill_jax.train.optimizers import Optimizer, make_optimizer
from clipdistill_jax.train.schedules import make_schedule
from clipdistill_jax.train.step import make_train_step

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, built: everything that its step is made of.

    Attributes:
      name: key in the config's `stages`.
      config: its part of the config.
      module: the model that trains.
      teacher: the module of the teacher, or None.
      init: key -> (params, model_state), of {"student": ..., "terms": ...}.
      optimizer: as built.
      template: the state's shapes, dtypes and shardings.
      frozen: the same of the teacher's variables, or None.
      step: jitted (state, teacher variables, batch) -> (state, metrics).
    """

    name: str
    config: Config
    module: DualEncoder
    teacher: DualEncoder | None
    init: Callable[[Any], tuple[Any, Any]]
    optimizer: Optimizer
    template: states.TrainState
    frozen: Any
    step: Any

    @property
    def placement(self) -> dict[str, Any]:
        """How the state lies on the mesh, for `state.create`."""
        return _placement(self.config)


def build_stage(config: Config, name: str, mesh: Mesh, vocab_size: int | None = None) -> Stage:
    """Builds a stage of a config, and checks that it fits together, without touching a device.

    Raises:
      ValueError: an unknown stage, model, term or field; a term that needs what a model does not give.
    """
    stage = stage_config(config, name)
    module = stage_module(config, name, vocab_size)
    teacher = stage_module(config, stage["teacher"], vocab_size) if stage["teacher"] else None
    batch = example_batch(config, name)
    terms = _terms(stage)
    seen = jax.eval_shape(lambda: _complete(module, batch))
    taught = jax.eval_shape(lambda: _complete(teacher, batch)) if teacher else None
    if taught is not None:
        check_terms(terms, seen[0], taught[0])

    def init(key: jax.Array) -> tuple[Any, Any]:
        # Only the terms' key depends on the teacher, so the student starts the same with and without one.
        variables = dict(module.init(jax.random.fold_in(key, 0), batch, method="complete"))
        projections = {}
        if taught is not None:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (seen[0], taught[0]))
            projections = init_terms(terms, jax.random.fold_in(key, 1), *zeros)
        return {"student": variables.pop("params"), "terms": projections}, variables

    shapes = jax.eval_shape(init, jax.random.key(0))
    optimizer = make_optimizer(plain(stage["optimizer"]), shapes[0], stage["steps"])
    template = states.abstract(init, optimizer, mesh, **_placement(stage))
    frozen = None
    if taught is not None:
        placed = sharding.infer_sharding(taught[1], mesh, *_rules(stage))
        frozen = sharding.shape_structs(taught[1], placed)
    loss = distillation_loss(
        retrieval_task,
        terms,
        student=_forward(module, stage["chunks"], train=True),
        teacher=_teach(teacher, stage["chunks"]) if teacher else None,
    )
    step = make_train_step(
        loss,
        optimizer,
        seed=config["seed"],
        shardings=states.shardings_of(template),
        ema_decay=stage["ema_decay"] or None,
        nan_policy=stage["nan_policy"],
    )
    return Stage(name, stage, module, teacher, init, optimizer, template, frozen, step)


def stage_config(config: Config, name: str) -> Config:
    """A stage's part of the config. Raises ValueError for an unknown name."""
    if name not in config["stages"]:
        raise ValueError(f"there is no stage {name!r}; the config has {', '.join(config['stages'])}")
    return config["stages"][name]


def stage_module(config: Config, name: str, vocab_size: int | None = None) -> DualEncoder:
    """The model that a stage trains."""
    stage = stage_config(config, name)
    if stage["model"] not in ("teacher", "student"):
        raise ValueError(f"stage {name!r}: model is {stage['model']!r}; it can be 'teacher' or 'student'")
    return build_model(
        plain(config[stage["model"]]), vocab_size=vocab_size, temporal=stage["temporal"] or None
    )


def example_batch(config: Config, name: str, size: int = 2) -> Batch:
    """A batch of zeros in the shapes of a stage; every mask is True."""
    stage, data = stage_config(config, name), config["data"]
    frames, side, tokens = stage["num_frames"] or data["num_frames"], data["image_size"], data["max_tokens"]
    return {
        "frames": jnp.zeros((size, frames, side, side, 3), jnp.uint8),
        "frame_mask": jnp.ones((size, frames), bool),
        "tokens": jnp.zeros((size, tokens), jnp.int32),
        "token_mask": jnp.ones((size, tokens), bool),
        "word_ids": jnp.zeros((size, tokens), jnp.int32),
        "example_id": jnp.zeros(size, jnp.int32),
        "clip_id": jnp.zeros(size, jnp.int32),
        "mask": jnp.ones(size, bool),
    }


def plain(value: Any) -> Any:
    """Nested dicts and lists in place of ConfigDicts and tuples."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _complete(module: DualEncoder, batch: Batch) -> tuple[Features, Any]:
    features, variables = module.init_with_output(jax.random.key(0), batch, method="complete")
    return features, variables


def _terms(stage: Config) -> tuple[WeightedTerm, ...]:
    made = []
    for name, spec in plain(stage["terms"]).items():
        if name not in TERMS:
            raise ValueError(f"stage term {name!r} is not one of {', '.join(TERMS)}")
        weight = make_schedule(spec.pop("weight"), stage["steps"])
        try:
            made.append(WeightedTerm(name, TERMS[name](**spec), weight))
        except TypeError as error:
            raise ValueError(f"term {name!r}: {error}") from error
    return tuple(made)


def _forward(module: DualEncoder, chunks: int, train: bool) -> Callable[..., tuple[Features, Any]]:
    """(params, model_state, batch, rng) -> (Features with `similarity`, model_state)."""

    def forward(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Features, Any]:
        def encode(part: Batch, model_state: Any, key: Any) -> tuple[Features, Any]:
            variables = {"params": params, **model_state}
            rngs = {} if key is None else {"dropout": key}
            features, changed = module.apply(
                variables, part, train=train, rngs=rngs, mutable=list(model_state) if train else []
            )
            # The scale is no row of the batch, so it does not go through the chunks.
            return features.replace(logit_scale=None), {**model_state, **changed}

        features, model_state = apply_in_chunks(encode, batch, chunks, model_state, rng)
        rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, chunks)}
        similarity = module.apply(
            {"params": params, **model_state}, features, features, method="similarity", rngs=rngs
        )
        return features.replace(similarity=similarity), model_state

    return forward


def _teach(module: DualEncoder, chunks: int) -> Callable[[Any, Batch], Features]:
    forward = _forward(module, chunks, train=False)

    def teach(variables: Any, batch: Batch) -> Features:
        state = {name: value for name, value in variables.items() if name != "params"}
        return forward(variables["params"], state, batch, None)[0]

    return teach


def _rules(stage: Config) -> tuple[list[sharding.Rule], int]:
    return [(regex, tuple(spec)) for regex, spec in stage["sharding_rules"]], stage["fsdp_min_size"]


def _placement(stage: Config) -> dict[str, Any]:
    rules, size = _rules(stage)
    return {"rules": rules, "fsdp_min_size": size, "ema": bool(stage["ema_decay"])}
