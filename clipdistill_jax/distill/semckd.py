"""SemCKD as published: the reference form of distillation with the teacher's layers as bases.

Source: Chen et al. 2021, "Cross-Layer Distillation with Semantic Calibration"; DefangChen/SemCKD
models/util.py (attention, regressors) and distiller_zoo/SemCKD.py (loss).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.distill.layers import combination_distance, layer_weights, position_weights, to_grid
from clipdistill_jax.models.temporal import unit


class BatchNorm(nn.Module):
    """Batch normalisation over the positions that count, by the batch's own statistics.

    A term never runs in evaluation, so there are no running averages.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], positions: Float[Array, "b f h w"]
    ) -> Float[Array, "b f h w c"]:
        """Maps [B, F, h, w, C], in float32."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        weight = positions[..., None] / jnp.maximum(jnp.sum(positions), 1)
        axes = (0, 1, 2, 3)
        mean = jnp.sum(x * weight, axes)
        variance = jnp.sum((x - mean) ** 2 * weight, axes)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


class Regressor(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to the teacher's width, between them twice that wide."""

    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], positions: Float[Array, "b f h w"]
    ) -> Float[Array, "b f h w d"]:
        """Maps [B, F, h, w, C] -> [B, F, h, w, width]."""
        for i, (size, width) in enumerate(((1, 2 * self.width), (3, 2 * self.width), (1, self.width))):
            x = nn.Conv(width, (size, size), use_bias=False, name=f"conv{i}")(x)
            if i < 2:
                x = nn.relu(BatchNorm(name=f"norm{i}")(x, positions))
        return x


class SemCKD(nn.Module):
    """mean_n sum_m w_nm |T_m - r_nm(S_n)|^2 with the weights' softmax over the teacher's layers m.

    A layer is described by its Gram matrix over the batch, row b for example b, through an MLP to unit
    length; the larger map of a pair is averaged to the grid of the smaller. Every pair has a regressor of its
    own: with wide teachers choose few layers.

    Attributes:
      batch_size: width of the Gram matrices. A smaller batch is filled up with zeros (SemCKD skips it,
        helper/loops.py:105); frames and examples that do not count are zeros as well.
    """

    batch_size: int

    @nn.compact
    def __call__(
        self,
        ours: Sequence[Float[Array, "b f _ _ _"]],
        theirs: Sequence[Float[Array, "b f _ _ _"]],
        seen: Bool[Array, "b f"],
    ) -> tuple[Float[Array, " b"], Float[Array, "b n m"]]:
        """Values [B], and the weights [B, N, M] of N student and M teacher layers.

        Args:
          ours, theirs: maps [B, F, h, w, C] of the student and, without gradient, of the teacher.
          seen: real frames of examples that count.

        Raises:
          ValueError: a batch larger than `batch_size`, or none given.
        """
        if len(seen) > self.batch_size:
            raise ValueError(
                f"form 'semckd' depends on the batch size: batch_size is {self.batch_size}, the batch has "
                f"{len(seen)} examples"
            )
        queries = jnp.stack([self._describe(x, seen, f"query{n}") for n, x in enumerate(ours)], 1)
        keys = jnp.stack([self._describe(x, seen, f"key{m}") for m, x in enumerate(theirs)], 1)
        weights = layer_weights(jnp.einsum("bnk,bmk->bnm", queries, keys))
        total = jnp.zeros(len(seen))
        for n, x in enumerate(ours):
            for m, target in enumerate(theirs):
                height, width = (min(x.shape[i], target.shape[i]) for i in (2, 3))
                positions = position_weights(seen, height, width)
                regressor = Regressor(target.shape[-1], name=f"regressor{n}_{m}")
                maps = regressor(to_grid(x, height, width), positions)
                target = to_grid(target, height, width)
                weight = weights[:, n, m][:, None]
                total = total + combination_distance(target, [maps], weight, positions, "B")
        return total / len(ours), weights

    def _describe(self, x: Float[Array, "b f h w c"], seen: Bool[Array, "b f"], name: str) -> Array:
        x = jnp.where(seen[..., None, None, None], x, 0).reshape(len(x), -1)
        gram = jnp.einsum(
            "bx,dx->bd", x, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        gram = jnp.pad(gram, ((0, 0), (0, self.batch_size - len(x))))
        width = self.batch_size // 4
        hidden = nn.relu(nn.Dense(2 * width, name=f"{name}_in")(gram))
        return unit(nn.Dense(width, name=f"{name}_out")(hidden))
