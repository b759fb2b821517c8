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
from clipdistill_jax.distill.cache import (
    RAW_CLIP,
    TEACHER,
    CacheSpec,
    cache_spec,
    cached_features,
    similarity_variables,
)
from clipdistill_jax.distill.objective import (
    WeightedTerm,
    check_terms,
    distillation_loss,
    init_terms,
    teacher_of,
)
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
MODELS = ("teacher", "student")  # sections of the config
TOKENS = ("tokens", "token_mask", "word_ids")
CACHED_FIELDS = {"teacher": TEACHER, "clip": RAW_CLIP}  # of a frozen model, what its cache keeps


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen model of a stage.

    Attributes:
      module: the model.
      features: shapes of what it gives for a batch of two.
      variables: shapes, dtypes and shardings of its variables.
      cached: its vectors come with the batch.
      layers: a term needs its feature maps, which are never cached.
    """

    module: DualEncoder
    features: Features
    variables: Any
    cached: bool
    layers: bool

    def needed(self, variables: Any) -> Any:
        """The part of its variables (or of a tree like them) that a step reads."""
        whole = not self.cached or self.layers
        return variables if whole else similarity_variables(self.module, variables)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, built: everything that its step is made of.

    Attributes:
      name: key in the config's `stages`.
      config: its part of the config.
      module: the model that trains.
      teachers: the frozen models that its terms compare with: "teacher", "clip", both or none.
      init: key -> (params, model_state), of {"student": ..., "terms": ...}.
      optimizer: as built.
      template: the state's shapes, dtypes and shardings.
      step: jitted (state, {teacher: variables}, batch) -> (state, metrics).
    """

    name: str
    config: Config
    module: DualEncoder
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


def build_stage(config: Config, name: str, mesh: Mesh, vocab: Mapping[str, int] | None = None) -> Stage:
    """Builds a stage of a config, and checks that it fits together, without touching a device.

    Args:
      config: of the run.
      name: of the stage.
      mesh: where it will run.
      vocab: {"teacher": entries of its tokenizer, "student": ...}; None leaves the text towers' own.

    Raises:
      ValueError: an unknown stage, model, term or field; a term that needs what a model does not give.
    """
    stage = stage_config(config, name)
    module = stage_module(config, name, vocab)
    batch = example_batch(config, name)
    terms = _terms(stage)
    seen = jax.eval_shape(lambda: _complete(module, own_tokens(batch, stage["model"])))[0]
    teachers = _teachers(config, stage, batch, terms, mesh, vocab)
    taught = {of: teacher.features for of, teacher in teachers.items()}
    check_terms(terms, seen, taught)

    def init(key: jax.Array) -> tuple[Any, Any]:
        # Only the terms' key depends on the teachers, so the student starts the same with and without them.
        own = own_tokens(batch, stage["model"])
        variables = dict(module.init(jax.random.fold_in(key, 0), own, method="complete"))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (seen, taught))
        projections = init_terms(terms, jax.random.fold_in(key, 1), *zeros)
        return {"student": variables.pop("params"), "terms": projections}, variables

    shapes = jax.eval_shape(init, jax.random.key(0))
    optimizer = make_optimizer(plain(stage["optimizer"]), shapes[0], stage["steps"])
    template = states.abstract(init, optimizer, mesh, **_placement(stage))
    loss = distillation_loss(
        retrieval_task,
        terms,
        student=_forward(module, stage["model"], stage["chunks"], train=True),
        teachers={of: _teach(of, teacher, stage["chunks"]) for of, teacher in teachers.items()},
    )
    step = make_train_step(
        loss,
        optimizer,
        seed=config["seed"],
        shardings=states.shardings_of(template),
        ema_decay=stage["ema_decay"] or None,
        nan_policy=stage["nan_policy"],
    )
    return Stage(name, stage, module, teachers, init, optimizer, template, step)


def _teachers(
    config: Config, stage: Config, batch: Batch, terms: tuple[WeightedTerm, ...], mesh: Mesh, vocab: Any
) -> dict[str, Frozen]:
    """The frozen models that the terms compare with, as far as the stage names them."""
    made = {}
    for of in dict.fromkeys(teacher_of(item.term) for item in terms):
        if not stage[of]:
            continue  # check_terms says which term misses it
        module = stage_module(config, stage["teacher"], vocab) if of == "teacher" else raw_clip(config, vocab)
        features, variables = jax.eval_shape(lambda module=module: _complete(module, batch))
        placed = sharding.infer_sharding(variables, mesh, *_rules(stage))
        layers = any("layers" in t.term.needs for t in terms if teacher_of(t.term) == of)  # type: ignore[attr-defined]
        made[of] = Frozen(
            module, features, sharding.shape_structs(variables, placed), bool(stage["cache"]), layers
        )
    return made


def stage_config(config: Config, name: str) -> Config:
    """A stage's part of the config, with what it takes from `data`. Raises ValueError for an unknown name."""
    if name not in config["stages"]:
        raise ValueError(f"there is no stage {name!r}; the config has {', '.join(config['stages'])}")
    stage = plain(config["stages"][name])
    return {**stage, "num_frames": stage["num_frames"] or config["data"]["num_frames"]}


def stage_module(config: Config, name: str, vocab: Mapping[str, int] | None = None) -> DualEncoder:
    """The model that a stage trains; `vocab` as in `build_stage`."""
    stage = stage_config(config, name)
    if stage["model"] not in MODELS:
        raise ValueError(f"stage {name!r}: model is {stage['model']!r}; it can be 'teacher' or 'student'")
    size = vocab[stage["model"]] if vocab else None
    return build_model(plain(config[stage["model"]]), vocab_size=size, temporal=stage["temporal"] or None)


def raw_clip(config: Config, vocab: Mapping[str, int] | None = None) -> DualEncoder:
    """The teacher's towers without a temporal head."""
    return build_model(
        plain(config["teacher"]), vocab_size=vocab["teacher"] if vocab else None, temporal="meanP"
    )


def student_variables(state: states.TrainState) -> dict[str, Any]:
    """The model's variables in a state: the parameters' average where one is kept."""
    return {"params": state.eval_params["student"], **state.model_state}


def own_tokens(batch: Batch, model: str) -> Batch:
    """The batch as a model reads it: a student with a tokenizer of its own finds its tokens as `tokens`."""
    if model != "student" or "student_tokens" not in batch:
        return batch
    return {**batch, **{name: batch[f"student_{name}"] for name in TOKENS}}


def example_batch(config: Config, name: str, size: int = 2) -> Batch:
    """A batch of zeros in the shapes of a stage; every mask is True."""
    stage, data = stage_config(config, name), config["data"]
    frames, side, tokens = stage["num_frames"], data["image_size"], data["max_tokens"]
    text = {
        "tokens": jnp.zeros((size, tokens), jnp.int32),
        "token_mask": jnp.ones((size, tokens), bool),
        "word_ids": jnp.zeros((size, tokens), jnp.int32),
    }
    if data["student_tokenizer"]:
        text |= {f"student_{key}": value for key, value in text.items()}
    return {
        "frames": jnp.zeros((size, frames, side, side, 3), jnp.uint8),
        "frame_mask": jnp.ones((size, frames), bool),
        **text,
        "example_id": jnp.zeros(size, jnp.int32),
        "clip_id": jnp.zeros(size, jnp.int32),
        "mask": jnp.ones(size, bool),
    }


def cached_example(stage: Stage, size: int) -> Batch:
    """Zeros in the shapes of the cached vectors that a stage's batches carry; empty where none do."""
    made: Batch = {}
    for of, teacher in stage.teachers.items():
        if teacher.cached:
            about: dict[str, Any] = dict(fingerprint="", data={}, clips=0, captions=0)
            made |= teacher_cache_spec(stage, of, **about).zeros(size, of)
    return made


def teacher_cache_spec(stage: Stage, of: str, **about: Any) -> CacheSpec:
    """What the cache of a stage's frozen model holds; see `distill.cache.cache_spec` for `about`."""
    model = stage.teachers[of]
    return cache_spec(
        model.features,
        frame_sampling=stage.config["frame_sampling"],
        fields=CACHED_FIELDS[of],
        dtype=jnp.dtype(model.module.vision.dtype).name,  # type: ignore[attr-defined]
        **about,
    )


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


def _forward(
    module: DualEncoder, model: str, chunks: int, train: bool
) -> Callable[..., tuple[Features, Any]]:
    """(params, model_state, batch, rng) -> (Features with `similarity`, model_state)."""

    def forward(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Features, Any]:
        batch = own_tokens(batch, model)

        def encode(part: Batch, model_state: Any, key: Any) -> tuple[Features, Any]:
            variables = {"params": params, **model_state}
            rngs = {} if key is None else {"dropout": key}
            features, changed = module.apply(
                variables, part, train=train, rngs=rngs, mutable=list(model_state) if train else []
            )
            # The scale is no row of the batch, so it does not go through the chunks.
            return features.replace(logit_scale=None), {**model_state, **changed}

        own = {key: value for key, value in batch.items() if "/" not in key}  # not the cached vectors
        features, model_state = apply_in_chunks(encode, own, chunks, model_state, rng)
        rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, chunks)}
        similarity = module.apply(
            {"params": params, **model_state}, features, features, train, method="similarity", rngs=rngs
        )
        scale = module.apply({"params": params}, method="scale")
        return features.replace(similarity=similarity, logit_scale=scale), model_state

    return forward


def _teach(of: str, teacher: Frozen, chunks: int) -> Callable[[Any, Batch], Features]:
    forward = _forward(teacher.module, "teacher", chunks, train=False)

    def compute(variables: Any, batch: Batch) -> Features:
        state = {name: value for name, value in variables.items() if name != "params"}
        return forward(variables["params"], state, batch, None)[0]

    def read(variables: Any, batch: Batch) -> Features:
        features = cached_features(teacher.module, variables, batch, of)
        # The compiler drops all of the forward pass but what the feature maps need.
        layers = compute(variables, batch).layers if teacher.layers else None
        return dataclasses.replace(features, layers=layers)

    return read if teacher.cached else compute


def _rules(stage: Config) -> tuple[list[sharding.Rule], int]:
    return [(regex, tuple(spec)) for regex, spec in stage["sharding_rules"]], stage["fsdp_min_size"]


def _placement(stage: Config) -> dict[str, Any]:
    rules, size = _rules(stage)
    return {"rules": rules, "fsdp_min_size": size, "ema": bool(stage["ema_decay"])}
