"""The cache of clips and captions: what a retrieval student's teachers say, read back by id."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from clipdistill_jax.distill.cache_files import Vectors
from clipdistill_jax.distill.vector_cache import (
    CacheSpec,
    TeacherCache,
    build_cache,
    computed_vectors,
    join_cached,
    layout_of,
    widened,
)
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.temporal import TightTransf

__all__ = [
    "RAW_CLIP",
    "TEACHER",
    "CacheSpec",
    "TeacherCache",
    "build_cache",
    "cache_spec",
    "cached_features",
    "frozen_vectors",
    "join_cached",
    "similarity_variables",
]

# What can be kept of a clip and of a caption. Feature maps are too large: they are computed again.
KINDS = {"clips": ("frames", "frame_mask", "temporal", "video"), "captions": ("text", "words", "word_mask")}
TEACHER = ("frames", "frame_mask", "temporal", "video", "text")
RAW_CLIP = ("frames", "frame_mask", "video", "text", "words", "word_mask")


def cache_spec(
    features: Features,
    *,
    fingerprint: str,
    data: Mapping[str, str | int],
    clips: int,
    captions: int,
    frame_sampling: str,
    fields: Sequence[str] = TEACHER,
    dtype: str = "bfloat16",
) -> CacheSpec:
    """Describes the cache of a model over a training set.

    Args:
      features: of any batch, or their shapes (`jax.eval_shape`).
      fingerprint: of the model's variables, see `distill.teacher`.
      data: what the vectors depend on beside the model: the prepared data, frames a clip, the tokenizer ...
      clips: how many clips the training draws from; clip_id runs from 0.
      captions: how many captions those have; example_id runs from 0.
      frame_sampling: the stage's. Vectors are of one choice of frames, so it must be "uniform".
      fields: of `Features`, what to keep: `TEACHER`, or `RAW_CLIP` for alignment with words.
      dtype: of the vectors, "bfloat16" or "float32"; `video` and `text` are float32 always.

    Raises:
      ValueError: frame_sampling or dtype is another, a field is not given by the model or cannot be kept.
    """
    if frame_sampling != "uniform":
        raise ValueError(
            f"frame_sampling is {frame_sampling!r}: a cache holds one choice of a clip's frames. Set it to "
            "'uniform', or cache to False"
        )
    for field in fields:
        if field not in {name for names in KINDS.values() for name in names} & features.given():
            why = "is not kept in a cache" if field in features.given() else "is not given by the model"
            raise ValueError(f"field {field!r} {why}")

    layouts = {
        kind: layout_of(features, [name for name in names if name in fields], dtype)
        for kind, names in KINDS.items()
    }
    return CacheSpec(fingerprint, dict(data), {"clips": clips, "captions": captions}, layouts)


def cached_features(module: DualEncoder, variables: Any, batch: Batch, name: str = "teacher") -> Features:
    """The `Features` of a batch's cached vectors, as the model itself would give them.

    Vectors are widened to float32. `similarity` is computed here, over the whole batch, by the model's own
    method; it needs no more than `similarity_variables`.

    Raises:
      ValueError: the batch has no vectors of that name.
    """
    wide = widened(batch, name)
    features = Features(**wide, logit_scale=module.apply(variables, method="scale"))
    if not {"text", "video", "frames", "frame_mask"} <= wide.keys():
        return features
    similarity = module.apply(variables, features, features, method="similarity")
    return dataclasses.replace(features, similarity=similarity)


def similarity_variables(module: DualEncoder, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that `cached_features` reads: no tower needs to lie on the devices."""
    parts = ("logit_scale", "temporal") if isinstance(module.temporal, TightTransf) else ("logit_scale",)
    return {"params": {part: variables["params"][part] for part in parts}}


def frozen_vectors(
    module: DualEncoder,
    variables: Any,
    spec: CacheSpec,
    *,
    clips: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    captions: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    place: Callable[[dict[str, Any]], Any],
    sharding: Any,
) -> dict[str, Vectors]:
    """A model's vectors by ids, computed on all devices: what `build_cache` wants.

    Args:
      module: the frozen model.
      variables: its variables, on the devices.
      spec: which fields.
      clips: ids [steps, b] -> batches with frames and frame_mask (`RetrievalData.clip_batches`).
      captions: ids [steps, b] -> batches with tokens, token_mask and word_ids (`caption_batches`).
      place: puts this host's rows on the devices (`train.sharding.place_batch`).
      sharding: of a batch on the devices.
    """

    def kind(name: str, batches: Any, method: str, inputs: tuple[str, ...]) -> Vectors:
        def encode(variables: Any, batch: Batch) -> Features:
            said: Any = module.apply(variables, *(batch[name] for name in inputs), method=method)
            return said

        return computed_vectors(
            encode, variables, spec.layouts[name], batches, inputs, place=place, sharding=sharding
        )

    return {
        "clips": kind("clips", clips, "encode_video", ("frames", "frame_mask")),
        "captions": kind("captions", captions, "encode_text", ("tokens", "token_mask", "word_ids")),
    }
