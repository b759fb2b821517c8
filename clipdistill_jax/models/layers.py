"""Pieces shared by the transformers of CLIP and of CLIP4Clip: attention, blocks, activations."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * sigmoid(1.702 x). Source: openai/CLIP clip/model.py:166."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, x * Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name; ValueError with the known names otherwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def layer_norm(eps: float, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, the variance taken in two passes as torch does."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head self-attention with separate q, k, v and o projections; the softmax is in float32.

    Attributes:
      heads: number of heads; divides the width.
      in_std, out_std: deviations of the normal initialisation of q, k, v and of o.
      dtype: compute dtype; parameters are float32.
    """

    heads: int
    in_std: float = 0.02
    out_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], mask: Bool[Array, "#b 1 #t t"] | None = None
    ) -> Float[Array, "b t c"]:
        """x [B, T, C]; mask True where a query (axis 2) may look at a key (axis 3).

        A query that may look at nothing gets the plain mean of the values: finite, never NaN.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"the width {width} does not divide over {self.heads} heads")

        def project(name: str) -> jax.Array:
            init = nn.initializers.normal(self.in_std)
            y = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(x)
            return y.reshape(*x.shape[:2], self.heads, -1)

        out = jax.nn.dot_product_attention(project("q"), project("k"), project("v"), mask=mask)
        init = nn.initializers.normal(self.out_std)
        return nn.Dense(width, dtype=self.dtype, kernel_init=init, name="o")(out.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers, fc1 (to `width`) and fc2 (back), with an activation between."""

    width: int
    act: str = "quick_gelu"
    in_std: float = 0.02
    out_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        init = nn.initializers.normal
        y = nn.Dense(self.width, dtype=self.dtype, kernel_init=init(self.in_std), name="fc1")(x)
        y = activation(self.act)(y)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init(self.out_std), name="fc2")(y)


class Block(nn.Module):
    """A pre-norm block: x + attn(ln_1(x)), then x + mlp(ln_2(x)).

    Attributes:
      depth: number of blocks in the stack, which scales the initialisation of the residual branches
        (openai/CLIP clip/model.py:298-308).
    """

    heads: int
    mlp_width: int
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    depth: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], mask: Bool[Array, "#b 1 #t t"] | None = None
    ) -> Float[Array, "b t c"]:
        width = x.shape[-1]
        in_std, out_std = width**-0.5, width**-0.5 * (2 * self.depth) ** -0.5
        attn = Attention(self.heads, in_std, out_std, self.dtype, name="attn")
        mlp = Mlp(self.mlp_width, self.act, (2 * width) ** -0.5, out_std, self.dtype, name="mlp")
        x = x + attn(layer_norm(self.ln_eps, self.dtype, "ln_1")(x), mask)
        return x + mlp(layer_norm(self.ln_eps, self.dtype, "ln_2")(x))


class Transformer(nn.Module):
    """A stack of pre-norm blocks block_0, block_1, ... without a final norm.

    Attributes:
      layers, heads, mlp_width: sizes; the width is the input's.
      act: activation of the MLPs (`ACTIVATIONS`).
      ln_eps: epsilon of every norm (CLIP 1e-5; CLIP4Clip's heads 1e-12).
      dtype: compute dtype; parameters are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    layers: int
    heads: int
    mlp_width: int
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], mask: Bool[Array, "#b 1 #t t"] | None = None
    ) -> tuple[Float[Array, "b t c"], ...]:
        """The output of every block, shallow to deep. mask: as in `Attention`."""
        block = nn.remat(Block) if self.remat else Block
        outputs = []
        for i in range(self.layers):
            x = block(
                self.heads,
                self.mlp_width,
                self.act,
                self.ln_eps,
                self.layers,
                self.dtype,
                name=f"block_{i}",
            )(x, mask)
            outputs.append(x)
        return tuple(outputs)
