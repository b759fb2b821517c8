"""Word-region alignment by optimal transport: how far a text's words are from an image's regions.

Sources: Chen et al. 2020, "UNITER", section 3 (word-region alignment); ChenRocks/UNITER model/ot.py; Xie et
al. 2018, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1 (IPOT).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SHORT = 1e-5  # vectors shorter than this are not brought to unit length (UNITER)


def cosine_cost(
    words: Float[Array, "b t d"],
    regions: Float[Array, "b r d"],
    word_mask: Bool[Array, "b t"],
    region_mask: Bool[Array, "b r"],
) -> Float[Array, "b t r"]:
    """1 - cos of every word's and every region's state, in float32; 0 where one of them is padding."""
    cosine = jnp.einsum("btd,brd->btr", _unit(words), _unit(regions), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(word_mask[:, :, None] & region_mask[:, None, :], 1 - cosine, 0.0)


def transport_plan(
    cost: Float[Array, "b t r"],
    word_mask: Bool[Array, "b t"],
    region_mask: Bool[Array, "b r"],
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> Float[Array, "b t r"]:
    """The cheapest way to move equal shares of mass from an example's words to its regions, by IPOT.

    Rows of real words sum to 1/words, columns of real regions to 1/regions, in the limit. An example
    without words or without regions has no plan: zeros. No gradient goes through a plan.

    Args:
      cost: of every pair, finite.
      word_mask, region_mask: which of them are real.
      beta: strength of the proximal term, in units of the cost; below a fiftieth of the largest cost, float32
        is too short for it.
      iterations: proximal steps; the result nears the exact plan as they grow.
      inner: Sinkhorn steps in each.
    """
    cost = jax.lax.stop_gradient(cost.astype(jnp.float32))
    real = word_mask[:, :, None] & region_mask[:, None, :]
    kernel = jnp.where(real, jnp.exp(-cost / beta), 0.0)
    words = word_mask.sum(-1, keepdims=True).astype(jnp.float32)  # [B, 1]
    regions = region_mask.sum(-1, keepdims=True).astype(jnp.float32)

    # Sums of products and no matrix products: float32 on every device.
    def step(_, state):  # type: ignore[no-untyped-def]
        plan, word_scale = state
        weighted = kernel * plan
        for _ in range(inner):
            region_scale = _inverse(regions * jnp.sum(weighted * word_scale[:, :, None], 1))
            word_scale = _inverse(words * jnp.sum(weighted * region_scale[:, None, :], 2))
        return word_scale[:, :, None] * weighted * region_scale[:, None, :], word_scale

    start = real.astype(jnp.float32), jnp.where(word_mask, _inverse(words), 0.0)
    return jax.lax.fori_loop(0, iterations, step, start)[0]


def transport_distance(
    words: Float[Array, "b t d"],
    regions: Float[Array, "b r d"],
    word_mask: Bool[Array, "b t"],
    region_mask: Bool[Array, "b r"],
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> Float[Array, " b"]:
    """Cost of the plan between an example's words and regions: sum of cost * plan, in [0, 2].

    The gradient goes to the states through the cost alone. Which words count is the caller's choice: UNITER's
    code takes [CLS] and [SEP] too. Other arguments as in `transport_plan`.
    """
    cost = cosine_cost(words, regions, word_mask, region_mask)
    plan = transport_plan(cost, word_mask, region_mask, beta=beta, iterations=iterations, inner=inner)
    return jnp.sum(cost * plan, (1, 2))


def _unit(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """x / max(|x|, 1e-5) in float32, with a finite gradient at 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SHORT**2))


def _inverse(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / x, and 0 for 0, which only padding has."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)
