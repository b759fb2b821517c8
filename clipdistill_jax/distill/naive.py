"""Terms that match a vector of the student with the teacher's: temporal and spatial distillation."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import Features


def frame_distance(
    student: Float[Array, "b f d"],
    teacher: Float[Array, "b f d"],
    frame_mask: Bool[Array, "b f"],
    distance: str,
) -> Float[Array, " b"]:
    """Mean over a clip's real frames of |s - t|^2 / D ("mse") or 1 - cos(s, t) ("cosine").

    A clip without frames gives 0. Raises ValueError for another `distance`.
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if distance == "mse":
        per_frame = jnp.mean((s - t) ** 2, -1)
    elif distance == "cosine":
        norms = jnp.sqrt(jnp.maximum(jnp.sum(s * s, -1) * jnp.sum(t * t, -1), 1e-24))
        per_frame = 1 - jnp.sum(s * t, -1) / norms
    else:
        raise ValueError(f"distance is {distance!r}; it can be 'mse' or 'cosine'")
    weight = frame_mask.astype(jnp.float32)
    return jnp.sum(per_frame * weight, -1) / jnp.maximum(weight.sum(-1), 1)


class _FrameKD(nn.Module):
    """Distance between one field of both models, the student's projected where widths differ."""

    distance: str = "mse"
    field: ClassVar[str]
    of: ClassVar = "teacher"

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        ours = getattr(student, self.field)
        theirs = jax.lax.stop_gradient(getattr(teacher, self.field))
        if ours.shape[-1] != theirs.shape[-1]:
            ours = nn.Dense(theirs.shape[-1], name="projection")(ours.astype(jnp.float32))
        return frame_distance(ours, theirs, student.frame_mask & teacher.frame_mask, self.distance)


class TemporalKD(_FrameKD):
    """Temporal distillation: frame vectors after the temporal heads (CLIPPING, "T").

    The paper does not say what is matched; the masked mean squared error of the heads' frame outputs is ours.
    """

    needs: ClassVar = ("temporal", "frame_mask")
    field: ClassVar = "temporal"


class SpatialKD(_FrameKD):
    """Spatial distillation: each frame's image vector before the temporal head (CLIPPING, "S").

    The paper does not say what is matched; the masked mean squared error of the image vectors is ours.
    """

    needs: ClassVar = ("frames", "frame_mask")
    field: ClassVar = "frames"
