"""Two towers and a temporal head: CLIP, CLIP4Clip and every retrieval student are this one module."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.temporal import TightTransf, pool, unit

Given = Array | np.ndarray
MAX_LOG_SCALE = float(np.log(100.0))


@jax.custom_vjp
def clamp_from_above(x: Float[Array, ""], limit: Any) -> Float[Array, ""]:
    """min(x, limit), whose gradient can still lead x down again from above the limit.

    CLIP4Clip clamps the parameter itself after each step (main_task_retrieval.py:286); this has the same
    effect as a pure function of the parameter.
    """
    return jnp.minimum(x, limit)


def _clamp_forward(x, limit):
    return jnp.minimum(x, limit), x <= limit


def _clamp_backward(below, gradient):
    return jnp.where(below, gradient, jnp.maximum(gradient, 0.0)), None


clamp_from_above.defvjp(_clamp_forward, _clamp_backward)


def mean_by_word(
    states: Float[Array, "*b t d"], word_ids: Int[Array, "*b t"]
) -> tuple[Float[Array, "*b t d"], Bool[Array, "*b t"]]:
    """Mean state of each word's tokens, and which words are there (as many slots as tokens)."""
    slots = states.shape[-2]
    member = jax.nn.one_hot(word_ids, slots, axis=-2, dtype=states.dtype)  # -1 belongs to no word
    count = member.sum(-1, keepdims=True)
    return (member @ states) / jnp.maximum(count, 1), count[..., 0] > 0


class DualEncoder(nn.Module):
    """A vision tower, a text tower, a temporal head and CLIP's logit scale.

    With one frame a clip and mean pooling this is CLIP; with CLIP's towers and `SeqTransf` it is CLIP4Clip
    (modules/modeling.py); with MobileViTv2 it is CLIPPING's student.

    Attributes:
      vision: images [N, H, W, 3] -> VisionOutput.
      text: tokens [B, T], token_mask [B, T] -> TextOutput.
      temporal: frames [B, F, D], frame_mask [B, F] -> [B, F, D].
      initial_logit_scale: exp of the scale's initial parameter.
    """

    vision: nn.Module
    text: nn.Module
    temporal: nn.Module
    initial_logit_scale: float = 1 / 0.07

    def setup(self):
        value = float(np.log(self.initial_logit_scale))
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(value), (), jnp.float32)

    def encode_video(
        self, frames: Shaped[Given, "b f h w 3"], frame_mask: Bool[Given, "b f"], train: bool = False
    ) -> Features:
        """Clip side of `Features`: frames, temporal, video, layers."""
        b, f = frames.shape[:2]
        frame_mask = jnp.asarray(frame_mask)
        seen = self.vision(frames.reshape(b * f, *frames.shape[2:]), train=train)
        per_frame = seen.embedding.reshape(b, f, -1)
        temporal = self.temporal(per_frame, frame_mask)
        return Features(
            frames=per_frame,
            frame_mask=frame_mask,
            temporal=temporal,
            video=pool(temporal, frame_mask),
            layers=tuple(x.reshape(b, f, *x.shape[1:]) for x in seen.layers),
        )

    def encode_text(
        self,
        tokens: Int[Given, "b t"],
        token_mask: Bool[Given, "b t"],
        word_ids: Int[Given, "b t"],
        train: bool = False,
    ) -> Features:
        """Text side of `Features`: text, tokens, words."""
        tokens, token_mask, word_ids = (jnp.asarray(x) for x in (tokens, token_mask, word_ids))
        said = self.text(tokens, token_mask, train=train)
        words, word_mask = mean_by_word(said.tokens, word_ids)
        return Features(
            text=said.embedding, tokens=said.tokens, token_mask=token_mask, words=words, word_mask=word_mask
        )

    def similarity(self, text: Features, video: Features, train: bool = False) -> Float[Array, "t v"]:
        """Scaled scores of every text against every clip, in float32.

        exp(logit_scale) * cosine for the loose heads; the tight head scores each pair, without a scale
        (CLIP4Clip modules/modeling.py:392-444).
        """
        if isinstance(self.temporal, TightTransf):
            return self.temporal.scores(text.text, video.frames, video.frame_mask, train)
        return self.scale() * unit(text.text) @ unit(video.video).T

    def scale(self) -> Float[Array, ""]:
        """The factor on cosines, at most 100."""
        return jnp.exp(clamp_from_above(self.logit_scale, MAX_LOG_SCALE))

    def __call__(self, batch: Batch, train: bool = False) -> Features:
        """Everything but `similarity`, which needs the whole batch: see `similarity`."""
        video = self.encode_video(batch["frames"], batch["frame_mask"], train)
        text = self.encode_text(batch["tokens"], batch["token_mask"], batch["word_ids"], train)
        sides = {name: getattr(text, name) for name in text.given()}
        return dataclasses.replace(video, logit_scale=self.scale(), **sides)

    def complete(self, batch: Batch) -> Features:
        """`Features` with `similarity`: touches every parameter, so it is what `init` runs."""
        features = self(batch, train=False)
        return dataclasses.replace(features, similarity=self.similarity(features, features))
