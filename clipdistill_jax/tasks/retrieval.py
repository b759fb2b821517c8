"""Video-text retrieval: the symmetric contrastive loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import NEVER, Batch, Features


def contrastive_loss(similarity: Float[Array, "b b"], valid: Bool[Array, " b"]) -> Float[Array, " b"]:
    """Symmetric cross-entropy of text-to-video and video-to-text, a value an example.

    Mean of the row's and the column's cross-entropy against the diagonal (CLIP4Clip
    modules/until_module.py:182). Examples that are not valid are in nobody's softmax and have loss 0.
    """
    logits = jnp.where(valid[None, :] & valid[:, None], similarity.astype(jnp.float32), NEVER)
    right = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, 1) - right
    columns = jax.nn.logsumexp(logits, 0) - right
    return jnp.where(valid, (rows + columns) / 2, 0.0)


def batch_accuracy(similarity: Float[Array, "b b"], valid: Bool[Array, " b"]) -> Float[Array, " b"]:
    """1 where a text's own clip scores highest of the batch, else 0."""
    logits = jnp.where(valid[None, :], similarity, NEVER)
    return jnp.where(valid, logits.argmax(1) == jnp.arange(len(valid)), False).astype(jnp.float32)


def retrieval_task(
    features: Features, batch: Batch
) -> tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Loss [B], which examples count [B], and further metrics [B] of a batch.

    An example counts if `batch["mask"]` says so and its clip has a frame.
    """
    valid = batch["mask"] & features.frame_mask.any(-1)
    loss = contrastive_loss(features.similarity, valid)
    return loss, valid, {"batch_accuracy": batch_accuracy(features.similarity, valid)}
