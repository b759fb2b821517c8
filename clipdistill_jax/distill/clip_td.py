"""Naive distillation of CLIP-TD: the image's vector and the text's, and what its terms share."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.models.features import Features

DISTANCES = ("l1", "l1_mean", "mse", "cosine")
CHOICES = ("all", "correct")


def vector_distance(
    student: Float[Array, "*b d"], teacher: Float[Array, "*b d"], distance: str
) -> Float[Array, "*b"]:
    """Distance of vectors s and t along the last axis, in float32.

    "l1": |s - t|_1, as in CLIP-TD, eqs. 3, 4 and 7; "l1_mean": that / D; "mse": |s - t|^2 / D; "cosine":
    1 - cos(s, t). Raises ValueError for another.
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if distance == "l1":
        return jnp.sum(jnp.abs(s - t), -1)
    if distance == "l1_mean":
        return jnp.mean(jnp.abs(s - t), -1)
    if distance == "mse":
        return jnp.mean((s - t) ** 2, -1)
    if distance == "cosine":
        norms = jnp.sqrt(jnp.maximum(jnp.sum(s * s, -1) * jnp.sum(t * t, -1), 1e-24))
        return 1 - jnp.sum(s * t, -1) / norms
    raise ValueError(f"distance is {distance!r}; it can be one of {', '.join(DISTANCES)}")


def over_choices(
    values: Float[Array, "b *k"], label: Int[Array, " b"] | None, choices: str
) -> Float[Array, " b"]:
    """One value an example: the mean over its choices, or the right choice's.

    Args:
      values: [B, K]; with K = 1, or [B], there is nothing to choose from: the value itself.
      label: index of the right choice. Where it is -1, "correct" gives 0.
      choices: "all" or "correct".

    Raises:
      ValueError: another `choices`, or "correct" without labels.
    """
    if choices not in CHOICES:
        raise ValueError(f"choices is {choices!r}; it can be one of {', '.join(CHOICES)}")
    if values.ndim == 1 or values.shape[1] == 1:
        return values.reshape(len(values))
    if choices == "all":
        return jnp.mean(values, -1)
    if label is None:
        raise ValueError("choices='correct' needs the label of each example, which the batch does not give")
    right = jnp.take_along_axis(values, jnp.maximum(label, 0)[:, None], -1)[:, 0]
    return jnp.where(label >= 0, right, 0.0)


class ChoiceKD(nn.Module):
    """What the terms of CLIP-TD share.

    Attributes:
      distance: see `vector_distance`. The default is the equations' norm, a sum over the width: the paper's
        weight of 0.05 would leave a mean over 512 channels a gradient of length 0.002.
      choices: distil every choice's text ("all", which the paper finds better: 9.2, Table 8), averaged, or
        the right one's ("correct"). Without choices both are the same.
    """

    distance: str = "l1"
    choices: str = "all"
    of: ClassVar = "clip"

    def projected(self, ours: Float[Array, "*b s"], theirs: Float[Array, "*c t"]) -> Float[Array, "*b t"]:
        """The student's vectors in the teacher's width; to be called once, in a compact method."""
        if ours.shape[-1] == theirs.shape[-1]:
            return ours
        return nn.Dense(theirs.shape[-1], name="projection")(ours.astype(jnp.float32))


class VisionKD(ChoiceKD):
    """L_dv of CLIP-TD (eq. 3): CLIP's image vector and the student's image token.

    A student that reads image and text together has an image token a choice: [B, K, D].
    """

    needs: ClassVar = ("image",)

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """[B]: the distance of the two vectors."""
        theirs = jax.lax.stop_gradient(teacher.image)
        ours = self.projected(student.image, theirs)
        if ours.ndim == 3:
            theirs = jnp.broadcast_to(theirs[:, None], ours.shape)
        return over_choices(vector_distance(ours, theirs, self.distance), teacher.label, self.choices)


class LanguageKD(ChoiceKD):
    """L_dt of CLIP-TD (eq. 4): CLIP's text vector and the student's [CLS]."""

    needs: ClassVar = ("text",)

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """[B]: the distance of the two vectors."""
        theirs = jax.lax.stop_gradient(teacher.text)
        values = vector_distance(self.projected(student.text, theirs), theirs, self.distance)
        return over_choices(values, teacher.label, self.choices)
