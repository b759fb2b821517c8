"""The cache of questions about images: raw CLIP's vector of each image, and of each choice and its words.

A step that reads it decodes no image for CLIP and runs no tower of CLIP's; see `distill.vector_cache`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipdistill_jax.distill.cache_files import Vectors
from clipdistill_jax.distill.choices import TEXT, encode_images, encode_texts, with_logits
from clipdistill_jax.distill.vector_cache import CacheSpec, computed_vectors, layout_of, widened
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features

KINDS = {"images": ("image",), "texts": ("text", "word_mask", "words")}
Chosen = int | Int[np.ndarray, " _n"]


def choice_cache_spec(
    features: Features,
    *,
    fingerprint: str,
    data: Mapping[str, str | int],
    images: Chosen,
    texts: Chosen,
    dtype: str = "bfloat16",
) -> CacheSpec:
    """Describes the cache of CLIP over the questions of a training set.

    Args:
      features: `choice_features` of any batch, or their shapes; Tc is the most tokens that a text can have.
      fingerprint: of the model's variables, see `distill.teacher`.
      data: what the vectors depend on beside the model: the prepared data, the image size, the tokenizer ...
      images: how many images there are; image_id runs from 0. Or the ids of those that are used, where a
        protocol trains on a part.
      texts: how many items there are (a question with its choices), by example_id; or the ids of those used.
      dtype: of the words' vectors, "bfloat16" or "float32"; those of images and texts are float32.

    Raises:
      ValueError: dtype is another; the ids of a kind are none, or negative.
    """
    given = {"images": images, "texts": texts}
    chosen = {kind: np.unique(x).astype(np.int64) for kind, x in given.items() if not isinstance(x, int)}
    for kind, ids in chosen.items():
        if not len(ids) or ids[0] < 0:
            raise ValueError(
                f"the {kind} to cache are {len(ids)} ids, from {ids[:1]}: none, or not of the data"
            )
    sizes = {kind: x if isinstance(x, int) else len(chosen[kind]) for kind, x in given.items()}
    layouts = {kind: layout_of(features, names, dtype) for kind, names in KINDS.items()}
    return CacheSpec(fingerprint, dict(data), sizes, layouts, chosen)


def frozen_choice_vectors(
    module: DualEncoder,
    variables: Any,
    spec: CacheSpec,
    *,
    images: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    texts: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    place: Callable[[dict[str, Any]], Any],
    sharding: Any,
) -> dict[str, Vectors]:
    """CLIP's vectors by ids, computed on all devices: what `build_cache` wants.

    Args:
      module: CLIP.
      variables: its variables, on the devices.
      spec: which fields.
      images: ids [steps, b] (-1 fills a step) -> for each step a batch with image.
      texts: the same of items: clip_tokens, clip_token_mask, clip_word_ids [b, K, up to Tc].
      place: puts this host's rows on the devices (`train.sharding.place_batch`).
      sharding: of a batch on the devices.
    """
    slots = spec.layouts["texts"]["words"][0][-2]

    def said(variables: Any, batch: Batch) -> Features:
        features = encode_texts(module, variables, *(batch[name] for name in TEXT))
        more = max(slots - features.words.shape[-2], 0)
        return dataclasses.replace(
            features,
            words=jnp.pad(features.words, ((0, 0), (0, 0), (0, more), (0, 0))),
            word_mask=jnp.pad(features.word_mask, ((0, 0), (0, 0), (0, more))),
        )

    def seen(variables: Any, batch: Batch) -> Features:
        return encode_images(module, variables, batch["image"])

    made = partial(computed_vectors, place=place, sharding=sharding)
    return {
        "images": made(seen, variables, spec.layouts["images"], images, ("image",)),
        "texts": made(said, variables, spec.layouts["texts"], texts, TEXT),
    }


def cached_choice_features(
    module: DualEncoder,
    variables: Any,
    batch: Batch,
    name: str = "clip",
    *,
    answers: Float[Array, "v d"] | None = None,
    anchors: Float[Array, "3"] | None = None,
) -> Features:
    """`choice_features` from a batch's cached vectors, but for its tokens; in float32, without gradient.

    Logits are those of the model itself, for images and texts are kept in float32. Of the variables it reads
    the logit scale alone: `similarity_variables`.

    Raises:
      ValueError: the batch has no vectors of that name, or see `with_logits`.
    """
    features = Features(**widened(batch, name), logit_scale=module.apply(variables, method="scale"))
    return with_logits(features, batch, answers, anchors)
