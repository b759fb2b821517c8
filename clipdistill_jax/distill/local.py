"""Local cross-modal alignment: what frames and words of raw CLIP say of every text and clip of the batch."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.distill.similarity import row_kl
from clipdistill_jax.models.features import NEVER, Features
from clipdistill_jax.models.temporal import unit


def frame_word_scores(
    frames: Float[Array, "v f d"],
    frame_mask: Bool[Array, "v f"],
    words: Float[Array, "t w d"],
    word_mask: Bool[Array, "t w"],
    block: int = 0,
) -> Float[Array, "t v"]:
    """Score of every text against every clip from the cosines of their words and frames, in float32.

    (mean over words of the best frame + mean over frames of the best word) / 2, over real frames and words
    only; 0 where either has none. The two directions of FILIP (Yao et al. 2021), averaged.

    Args:
      block: texts at a time, so that only [block, V, F, W] cosines are held, in the backward pass too;
        0: all at once.
    """
    frames = unit(frames)

    def score(text: tuple[Array, Array]) -> Array:
        said, real = text
        # A scale of 100 follows: the rounding of bfloat16 or TF32 would show.
        cosines = jnp.einsum("vfd,wd->vfw", frames, unit(said), precision=jax.lax.Precision.HIGHEST)
        best_frame = jnp.max(jnp.where(frame_mask[:, :, None], cosines, NEVER), 1)
        best_word = jnp.max(jnp.where(real, cosines, NEVER), 2)
        by_word = jnp.sum(best_frame * real, 1) / jnp.maximum(jnp.sum(real), 1)
        by_frame = jnp.sum(best_word * frame_mask, 1) / jnp.maximum(jnp.sum(frame_mask, 1), 1)
        return jnp.where(frame_mask.any(1) & real.any(), (by_word + by_frame) / 2, 0.0)

    if not 0 < block < len(words):
        return jax.vmap(score)((words, word_mask))
    return jax.lax.map(jax.checkpoint(score), (words, word_mask), batch_size=block)


class LocalAlignment(nn.Module):
    """Local cross-modal alignment, L_L of CLIPPING: D_KL of text-to-video and of video-to-text rows.

    The rows hold `frame_word_scores` times a scale. The paper names raw CLIP as the teacher, and gives
    neither s' nor the direction of the KL nor a temperature: the scores, KL(teacher || student) and 1 are
    ours. Frames are the image vectors before any temporal head, for raw CLIP has none. Words align by
    index, whatever tokenizers made them, and count where both models have them; the widths of the two
    joint spaces may differ.

    Attributes:
      temperature: divides the logits of both models; the loss is multiplied by its square.
      scale: factor on the cosines of both models; 0 is each model's own logit_scale, the one with which its
        cosines were trained: raw CLIP's says how sure it is, and the student's can follow it.
      block: texts at a time, see `frame_word_scores`.
    """

    temperature: float = 1.0
    scale: float = 0.0
    block: int = 0
    of: ClassVar = "clip"
    needs: ClassVar = ("frames", "frame_mask", "words", "word_mask", "logit_scale")

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """[B]: the two divergences of each example's row and column."""
        teacher = jax.lax.stop_gradient(teacher)
        frame_mask = student.frame_mask & teacher.frame_mask
        slots = min(student.words.shape[1], teacher.words.shape[1])
        word_mask = student.word_mask[:, :slots] & teacher.word_mask[:, :slots]

        def scores(model: Features) -> Array:
            cosines = frame_word_scores(
                model.frames, frame_mask, model.words[:, :slots], word_mask, self.block
            )
            return cosines * (self.scale or model.logit_scale)

        ours, theirs = scores(student), scores(teacher)
        both = row_kl(ours, theirs, valid, self.temperature) + row_kl(
            ours.T, theirs.T, valid, self.temperature
        )
        return jnp.where(valid, both, 0.0)
