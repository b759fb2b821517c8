"""Raw CLIP as the teacher of questions about images: vectors of image, choices and words, and its logits.

A batch has B questions with K choices and Tc tokens a choice:
  image            [B, H, W, 3] uint8  what CLIP sees
  clip_tokens, clip_token_mask, clip_word_ids  [B, K, Tc]  the choices' texts; words count over the whole text
  importance       [B, K, Tc] float    of word i at i; label [B] int: both go through as they are
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from clipdistill_jax.distill.confidence import anchor_logits, choice_logits
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.joint import fold

TEXT = ("clip_tokens", "clip_token_mask", "clip_word_ids")
INPUTS = ("image", *TEXT)


def encode_images(module: DualEncoder, variables: Any, image: Shaped[AnyArray, "b h w 3"]) -> Features:
    """`image` [B, D], as projected (not normalised)."""
    frames = jnp.asarray(image)[:, None]
    seen: Any = module.apply(variables, frames, jnp.ones(frames.shape[:2], bool), method="encode_video")
    return Features(image=seen.frames[:, 0])


def encode_texts(
    module: DualEncoder,
    variables: Any,
    tokens: Int[AnyArray, "b k t"],
    token_mask: Bool[AnyArray, "b k t"],
    word_ids: Int[AnyArray, "b k t"],
) -> Features:
    """`text` [B, K, D], `tokens`, `token_mask`, `words` and `word_mask` [B, K, Tc ...] of the choices."""
    rows = (fold(x) for x in (tokens, token_mask, word_ids))
    said: Any = module.apply(variables, *rows, method="encode_text")
    return jax.tree.map(lambda x: x.reshape(*tokens.shape[:2], *x.shape[1:]), said)


def choice_features(
    module: DualEncoder,
    variables: Any,
    batch: Batch,
    *,
    answers: Float[Array, "v d"] | None = None,
    anchors: Float[Array, "3"] | None = None,
) -> Features:
    """What raw CLIP says of questions, for the terms of CLIP-TD and its gate; without gradient.

    Examples are treated apart, and every field but `logit_scale` has a row for each: it may run in chunks
    of the batch (`train.accumulate.apply_in_chunks`).

    Args:
      module: CLIP; its temporal head is not used.
      variables: its variables.
      batch: as this module says.
      answers: VQA's vectors, see `answer_vectors`.
      anchors: SNLI-VE's, see `fit_anchors`.

    Returns:
      image, text, tokens, token_mask, words, word_mask, logit_scale, importance and label as far as the batch
      has them, and `logits`: see `with_logits`.

    Raises:
      ValueError: an input is missing, or see `with_logits`.
    """
    missing = [name for name in INPUTS if name not in batch]
    if missing:
        raise ValueError(
            f"CLIP reads {', '.join(INPUTS)} of questions; the batch has no {', '.join(missing)}"
        )
    features = dataclasses.replace(
        encode_texts(module, variables, *(batch[name] for name in TEXT)),
        image=encode_images(module, variables, batch["image"]).image,
        logit_scale=module.apply(variables, method="scale"),
    )
    return with_logits(features, batch, answers, anchors)


def with_logits(
    features: Features,
    batch: Batch,
    answers: Float[Array, "v d"] | None,
    anchors: Float[Array, "3"] | None,
) -> Features:
    """`features` with `logits` over the choices that the student has, and the batch's importance and label.

    Logits are of the batch's texts (VCR), [B, K]; with `answers`, of these (VQA), [B, V]; with `anchors`, of
    contradiction, entailment and neutral (SNLI-VE; CLIP-TD, 4.2.1), [B, 3].

    Raises:
      ValueError: both are given, or anchors and more than one text an image.
    """
    if answers is not None and anchors is not None:
        raise ValueError("give the vectors of answers (VQA) or anchors (SNLI-VE), not both")
    texts = features.text if answers is None else answers
    logits = choice_logits(features.image, texts, features.logit_scale)
    if anchors is not None:
        if logits.shape[1] != 1:
            raise ValueError(f"anchors are for one text an image; the batch has {logits.shape[1]}")
        logits = anchor_logits(logits[:, 0], anchors)
    given = {name: jnp.asarray(batch[name]) for name in ("importance", "label") if name in batch}
    return jax.lax.stop_gradient(dataclasses.replace(features, logits=logits, **given))


def answer_vectors(
    module: DualEncoder,
    variables: Any,
    tokens: Int[AnyArray, "v t"],
    token_mask: Bool[AnyArray, "v t"],
    batch_size: int = 256,
) -> Float[Array, "v d"]:
    """CLIP's vectors of the answers of a vocabulary, in its order; to be computed once a run, under `jit`.

    Args:
      module: CLIP.
      variables: its variables.
      tokens: of `answer_prompts`.
      token_mask: True where a token is real.
      batch_size: answers at once; the last batch may have fewer.
    """

    def encode(rows: tuple[Int[Array, "*n t"], Bool[Array, "*n t"]]) -> Float[Array, " d"]:
        one, mask = (x[None] for x in rows)
        said: Any = module.apply(variables, one, mask, jnp.full_like(one, -1), method="encode_text")
        return said.text[0]

    rows = (jnp.asarray(tokens), jnp.asarray(token_mask))
    return jax.lax.stop_gradient(jax.lax.map(encode, rows, batch_size=batch_size))


def similarities(
    module: DualEncoder,
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    place: Callable[[dict[str, Any]], Any] = dict,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> Float[np.ndarray, " n"]:
    """logit_scale * cosine of the pairs of a split, for `fit_anchors`; labels are not read.

    Args:
      module: CLIP.
      variables: its variables.
      batches: this host's, each once, with one text an image (K = 1), and `mask` [B], False on padding.
      place: puts this host's rows on the devices (`train.sharding.place_batch`).
      fetch: gives every host all rows (`train.sharding.fetch`).

    Raises:
      ValueError: there is more than one text an image.
    """

    @jax.jit
    def compare(variables: Any, batch: Batch) -> tuple[Array, Array]:
        return choice_features(module, variables, batch).logits, batch["mask"]

    found = [np.zeros(0, np.float32)]
    for batch in batches:
        placed = place({name: batch[name] for name in (*INPUTS, "mask")})
        logits, mask = fetch(compare(variables, placed))
        if logits.shape[1] != 1:
            raise ValueError(f"similarities are of one text an image; the batch has {logits.shape[1]}")
        found.append(np.asarray(logits)[np.asarray(mask), 0])
    return np.concatenate(found)
