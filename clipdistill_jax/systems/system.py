"""What a stage asks of its kind of data, and how both read a config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.distill.cache import CacheSpec
from clipdistill_jax.distill.cache_files import Vectors
from clipdistill_jax.distill.objective import Student, Teach
from clipdistill_jax.models.features import Batch, Features

Config = Mapping[str, Any]
Vocab = Mapping[str, Any]
Task = Any  # (Features, batch) -> loss [B], which examples count [B], further metrics
MODELS = ("teacher", "student")  # sections of the config


@runtime_checkable
class System(Protocol):
    """A kind of data: the models that read it, its batches, and what is learned from them.

    Attributes:
      config: of the run.
      unit: what a batch is made of, in reports of speed.
      cached_kinds: what a cache has rows of, by the names that `cache_spec` takes their numbers under.
      vocab: sizes that only the data knows: {"teacher": entries of its tokenizer, "student": ..., and for
        questions what `systems.questions` says}; None leaves the models' own.
    """

    unit: ClassVar[str]
    cached_kinds: ClassVar[tuple[str, ...]]

    @property
    def config(self) -> Config: ...

    @property
    def vocab(self) -> Vocab | None: ...

    def module(self, name: str) -> Any:
        """The model that a stage trains."""

    def frozen_module(self, stage: Config, of: str) -> Any:
        """The frozen model "teacher" or "clip" of a stage."""

    def example(self, name: str, size: int = 2) -> Batch:
        """A batch of zeros in the shapes of a stage; every mask is True."""

    def start(self, init: Config, params: Any, model_state: Any, runs: Sequence[Path]) -> tuple[Any, Any]:
        """The model's (params, model_state), host arrays, with what a stage's `init` names laid over them."""

    def own(self, batch: Batch, stage: Config) -> Batch:
        """The batch as the stage's model reads it."""

    def frozen(self, module: Any, stage: Config, of: str, batch: Batch) -> tuple[Features, Any]:
        """What a frozen model gives for a batch, and its variables, random: for their shapes."""

    def student(self, module: Any, stage: Config) -> Student:
        """(params, model_state, batch, rng) -> (Features, new model_state), training."""

    def teach(self, module: Any, stage: Config, of: str, layers: bool) -> Teach:
        """(variables, batch) -> Features of a frozen model; from its cache where the stage has one.

        `layers`: a term needs its feature maps.
        """

    def objective(self, stage: Config) -> dict[str, Any]:
        """`task`, `distil_on` and `adversary` of `distill.objective.distillation_loss`."""

    def cache_spec(self, module: Any, stage: Config, of: str, features: Features, **about: Any) -> CacheSpec:
        """What the cache of a frozen model holds."""

    def vectors(self, *args: Any, **given: Any) -> dict[str, Vectors]:
        """A frozen model's vectors by ids, as `distill.vector_cache.build_cache` wants them."""

    def evaluator(self, module: Any, stage: Config, mesh: Mesh) -> Any:
        """(variables, split) -> (metrics, arrays that they are of); None where there is nothing to judge."""

    def needed(self, module: Any, stage: Config, layers: bool, variables: Any) -> Any:
        """The part of a frozen model's variables (or of a tree like them) that a step reads."""


def plain(value: Any) -> Any:
    """Nested dicts and lists in place of ConfigDicts and tuples."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def stage_config(config: Config, name: str) -> Config:
    """A stage's part of the config, with what it takes from `data`.

    Raises:
      ValueError: an unknown stage, or a model that is neither teacher nor student.
    """
    if name not in config["stages"]:
        raise ValueError(f"there is no stage {name!r}; the config has {', '.join(config['stages'])}")
    stage = plain(config["stages"][name])
    if stage["model"] not in MODELS:
        raise ValueError(f"stage {name!r}: model is {stage['model']!r}; it can be 'teacher' or 'student'")
    return {**stage, "num_frames": stage["num_frames"] or config["data"]["num_frames"]}


def text_zeros(shape: tuple[int, ...], prefix: str = "") -> Batch:
    """Tokens, their mask and their words' ids, all zero (the mask True)."""
    return {
        f"{prefix}tokens": jnp.zeros(shape, jnp.int32),
        f"{prefix}token_mask": jnp.ones(shape, bool),
        f"{prefix}word_ids": jnp.zeros(shape, jnp.int32),
    }


def init_with_output(module: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """(Features, variables) of a model at its first initialisation."""
    return module.init_with_output(jax.random.key(0), batch, method="complete")
