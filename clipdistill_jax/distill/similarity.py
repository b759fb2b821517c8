"""Terms that match distributions over the batch: global cross-modal alignment."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import NEVER, Features


def row_kl(
    student: Float[Array, "b c"],
    teacher: Float[Array, "b c"],
    valid: Bool[Array, " c"],
    temperature: float,
) -> Float[Array, " b"]:
    """KL(teacher || student) of each row's softmax over the valid columns, times temperature squared."""
    log_p = jax.nn.log_softmax(jnp.where(valid, teacher.astype(jnp.float32) / temperature, NEVER), -1)
    log_q = jax.nn.log_softmax(jnp.where(valid, student.astype(jnp.float32) / temperature, NEVER), -1)
    return jnp.sum(jnp.where(valid, jnp.exp(log_p) * (log_p - log_q), 0.0), -1) * temperature**2


class GlobalAlignment(nn.Module):
    """Global cross-modal alignment, L_G of CLIPPING.

    D_KL of the text-to-video rows plus D_KL of the video-to-text rows of the scaled similarities. The paper
    does not give the direction or a temperature: KL(teacher || student) and 1 are ours; the usual factor
    temperature^2 keeps the gradient's size.
    """

    temperature: float = 1.0
    of: ClassVar = "teacher"
    needs: ClassVar = ("similarity",)

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        ours, theirs = student.similarity, jax.lax.stop_gradient(teacher.similarity)
        both = row_kl(ours, theirs, valid, self.temperature) + row_kl(
            ours.T, theirs.T, valid, self.temperature
        )
        return jnp.where(valid, both, 0.0)
