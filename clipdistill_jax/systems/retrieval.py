"""Retrieval: clips with captions, read by two towers; the batch's other examples are the negatives."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.distill.cache import (
    RAW_CLIP,
    TEACHER,
    CacheSpec,
    cache_spec,
    cached_features,
    frozen_vectors,
    similarity_variables,
)
from clipdistill_jax.distill.cache_files import Vectors
from clipdistill_jax.evaluate.evaluator import RetrievalEvaluator
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.systems.system import Config, Vocab, init_with_output, plain, stage_config, text_zeros
from clipdistill_jax.tasks.retrieval import retrieval_task
from clipdistill_jax.train.accumulate import apply_in_chunks
from clipdistill_jax.weights import read_initial

TOKENS = ("tokens", "token_mask", "word_ids")
CACHED_FIELDS = {"teacher": TEACHER, "clip": RAW_CLIP}  # of a frozen model, what its cache keeps
Forward = Callable[[Any, Any, Batch, Any], tuple[Features, Any]]


@dataclasses.dataclass(frozen=True)
class RetrievalSystem:
    """See `system.System`."""

    config: Config
    vocab: Vocab | None = None
    unit: ClassVar[str] = "clips"
    cached_kinds: ClassVar[tuple[str, ...]] = ("clips", "captions")

    def module(self, name: str) -> DualEncoder:
        """The model that a stage trains."""
        stage = stage_config(self.config, name)
        size = self.vocab[stage["model"]] if self.vocab else None
        spec = plain(self.config[stage["model"]])
        return build_model(spec, vocab_size=size, temporal=stage["temporal"] or None)

    def frozen_module(self, stage: Config, of: str) -> DualEncoder:
        """The teacher's own model; or raw CLIP, its towers without a temporal head."""
        if of == "teacher":
            return self.module(stage["teacher"])
        size = self.vocab["teacher"] if self.vocab else None
        return build_model(plain(self.config["teacher"]), vocab_size=size, temporal="meanP")

    def example(self, name: str, size: int = 2) -> Batch:
        """A batch of zeros in the shapes of a stage; every mask is True."""
        stage, data = stage_config(self.config, name), self.config["data"]
        frames, side, tokens = stage["num_frames"], data["image_size"], data["max_tokens"]
        text = text_zeros((size, tokens))
        if data["student_tokenizer"]:
            text |= text_zeros((size, tokens), "student_")
        return {
            "frames": jnp.zeros((size, frames, side, side, 3), jnp.uint8),
            "frame_mask": jnp.ones((size, frames), bool),
            **text,
            "example_id": jnp.zeros(size, jnp.int32),
            "clip_id": jnp.zeros(size, jnp.int32),
            "mask": jnp.ones(size, bool),
        }

    def start(self, init: Config, params: Any, model_state: Any, runs: Sequence[Path]) -> tuple[Any, Any]:
        """See `weights.read_initial`."""
        return read_initial(init, params, model_state, runs)

    def own(self, batch: Batch, stage: Config) -> Batch:
        """The batch as the stage's model reads it."""
        return own_tokens(batch, stage["model"])

    def frozen(self, module: DualEncoder, stage: Config, of: str, batch: Batch) -> tuple[Features, Any]:
        """What a frozen model gives for a batch, and its variables, random."""
        return init_with_output(module, batch)

    def student(self, module: DualEncoder, stage: Config) -> Forward:
        """Encodes in chunks, then scores the whole batch."""
        return forward(module, stage["model"], stage["chunks"], train=True)

    def teach(
        self, module: DualEncoder, stage: Config, of: str, layers: bool
    ) -> Callable[[Any, Batch], Features]:
        """A frozen model's Features; feature maps are computed even where the vectors are cached."""
        encode = forward(module, "teacher", stage["chunks"], train=False)

        def compute(variables: Any, batch: Batch) -> Features:
            state = {name: value for name, value in variables.items() if name != "params"}
            return encode(variables["params"], state, batch, None)[0]

        def read(variables: Any, batch: Batch) -> Features:
            features = cached_features(module, variables, batch, of)
            # The compiler drops all of the forward pass but what the feature maps need.
            maps = compute(variables, batch).layers if layers else None
            return dataclasses.replace(features, layers=maps)

        return read if stage["cache"] else compute

    def objective(self, stage: Config) -> dict[str, Any]:
        """The symmetric contrastive loss."""
        return {"task": retrieval_task}

    def cache_spec(
        self, module: DualEncoder, stage: Config, of: str, features: Features, **about: Any
    ) -> CacheSpec:
        """What the cache of a frozen model holds; see `distill.cache.cache_spec` for `about`."""
        return cache_spec(
            features,
            frame_sampling=stage["frame_sampling"],
            fields=CACHED_FIELDS[of],
            dtype=jnp.dtype(module.vision.dtype).name,  # type: ignore[attr-defined]
            **about,
        )

    def vectors(self, *args: Any, **given: Any) -> dict[str, Vectors]:
        """See `distill.cache.frozen_vectors`."""
        return frozen_vectors(*args, **given)

    def evaluator(self, module: DualEncoder, stage: Config, mesh: Mesh) -> RetrievalEvaluator:
        """Scores every caption against every clip."""
        return RetrievalEvaluator(module, mesh)

    def needed(self, module: DualEncoder, stage: Config, layers: bool, variables: Any) -> Any:
        """All of a frozen model's variables, or with a cache those that score its vectors."""
        whole = not stage["cache"] or layers
        return variables if whole else similarity_variables(module, variables)


def own_tokens(batch: Batch, model: str) -> Batch:
    """The batch as a model reads it: a student with a tokenizer of its own finds its tokens as `tokens`."""
    if model != "student" or "student_tokens" not in batch:
        return batch
    return {**batch, **{name: batch[f"student_{name}"] for name in TOKENS}}


def forward(module: DualEncoder, model: str, chunks: int, train: bool) -> Forward:
    """(params, model_state, batch, rng) -> (Features with `similarity`, model_state)."""

    def run(params: Any, model_state: Any, batch: Batch, rng: Any) -> tuple[Features, Any]:
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

    return run
