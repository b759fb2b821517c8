"""What the layer terms are made of: which layers, on which grid, with which weights, how far apart."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import NEVER


def one_of(term: str, field: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError where a term's field has a value that is not known."""
    if value not in known:
        raise ValueError(f"term {term!r}: {field} is {value!r}; it can be {', '.join(map(repr, known))}")


def choose_layers(term: str, whose: str, wanted: Sequence[int], count: int) -> tuple[int, ...]:
    """Indices, from 0, of the layers that a term uses: those wanted (-1 is the last), or all.

    Raises:
      ValueError: there are no layers, or not as many as an index asks for; names the term.
    """
    if not count:
        raise ValueError(f"term {term!r} needs feature maps of the {whose}, whose vision tower gives none")
    for index in wanted:
        if not -count <= index < count:
            raise ValueError(
                f"term {term!r}: {whose}_layers has {index}, but the {whose} has {count} layers: "
                f"0 to {count - 1}, or {-count} to -1 from the end"
            )
    return tuple(index % count for index in wanted) or tuple(range(count))


def spread_layers(students: int, teachers: int) -> tuple[int, ...]:
    """For each of so many student layers a teacher layer, evenly spread and the last with the last.

    With a whole ratio k this is every k-th layer, as in TinyBERT (general_distill.py:410-440).
    """
    return tuple(-(-(n + 1) * teachers // students) - 1 for n in range(students))


def to_grid(x: Float[Array, "b f h w c"], height: int, width: int) -> Float[Array, "b f {height} {width} c"]:
    """Maps on another grid, in float32: means of what falls in a cell, linear interpolation to a finer grid.

    The cells are those of torch's adaptive_avg_pool2d (they overlap where sizes do not divide); the
    interpolation has half-pixel centres, as torch's bilinear one with align_corners=False.
    """
    for axis, equation, target in ((2, "gh,bfhwc->bfgwc", height), (3, "gw,bfhwc->bfhgc", width)):
        size = x.shape[axis]
        if target < size:
            start = np.arange(target) * size // target
            stop = -(-np.arange(1, target + 1) * size // target)
            inside = (np.arange(size) >= start[:, None]) & (np.arange(size) < stop[:, None])
            # Zeros and ones are exact in bfloat16, so the sum loses nothing before the division.
            total = jnp.einsum(
                equation,
                jnp.asarray(inside, x.dtype),
                x,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            x = total / jnp.asarray(stop - start, jnp.float32).reshape(-1, *(1,) * (4 - axis))
        elif target > size:
            shape = (*x.shape[:axis], target, *x.shape[axis + 1 :])
            x = jax.image.resize(x.astype(jnp.float32), shape, method="linear")
    return x.astype(jnp.float32)


def clip_vector(x: Float[Array, "b f h w c"], seen: Bool[Array, "b f"]) -> Float[Array, "b c"]:
    """Mean of a map over a clip's real frames and all positions, with mean 0 and variance 1 over channels."""
    per_frame = jnp.mean(x, (2, 3), dtype=jnp.float32)
    weight = seen.astype(jnp.float32)[..., None]
    mean = jnp.sum(per_frame * weight, 1) / jnp.maximum(weight.sum(1), 1)
    return jax.nn.standardize(mean, epsilon=1e-5)


def depth_mask(rows: Sequence[int], columns: Sequence[int]) -> Bool[np.ndarray, "r c"]:
    """Which layers of the other model (columns) a layer (row) may use: those of comparable or lower depth.

    The r-th of R layers, by depth, spans (r/R, (r+1)/R]; a column may be used where it begins before the
    row ends. So the shallowest column may always be used, and the deepest row may use all. With twelve
    rows and three columns, rows 0-3 use one, rows 4-7 two, rows 8-11 three.
    """
    row, column = (np.argsort(np.argsort(x)) for x in (np.asarray(rows), np.asarray(columns)))
    return column[None, :] * len(row) < (row[:, None] + 1) * len(column)


def layer_weights(
    scores: Float[Array, "b r c"], allowed: Bool[np.ndarray, "r c"] | None = None, top_k: int = 0
) -> Float[Array, "b r c"]:
    """Softmax of every row over its columns, in float32: every row sums to one.

    Args:
      scores: of layers of one model (rows) against layers of the other (columns).
      allowed: columns that a row may use; None: all.
      top_k: of these only so many with the highest scores; 0: all.
    """
    scores = scores.astype(jnp.float32)
    if allowed is not None:
        scores = jnp.where(allowed, scores, NEVER)
    if top_k:
        kept = jax.nn.one_hot(jax.lax.top_k(scores, top_k)[1], scores.shape[-1]).sum(-2) > 0
        scores = jnp.where(kept, scores, NEVER)
    return jax.nn.softmax(scores, -1)


def position_weights(
    seen: Bool[Array, "b f"], height: int, width: int, key: Array | None = None, rate: float = 0.0
) -> Float[Array, "b f {height} {width}"]:
    """1 at the positions of real frames, else 0; with a key, each is dropped with probability `rate`."""
    shape = (*seen.shape, height, width)
    kept = (
        seen[..., None, None]
        if key is None
        else seen[..., None, None] & jax.random.bernoulli(key, 1 - rate, shape)
    )
    return jnp.broadcast_to(kept, shape).astype(jnp.float32)


def combine(
    maps: Sequence[Float[Array, "b f h w c"]], weights: Float[Array, "b n"]
) -> Float[Array, "b f h w c"]:
    """sum_n weights[:, n] * maps[n], in float32: the linear combination of equations 1 and 2 of CLIPPING."""
    # A sum and no einsum: it is fused into what reads it, and exact in float32 on every device.
    total = weights[:, 0, None, None, None, None] * maps[0].astype(jnp.float32)
    for n in range(1, len(maps)):
        total = total + weights[:, n, None, None, None, None] * maps[n].astype(jnp.float32)
    return total


def combination_distance(
    target: Float[Array, "b f h w c"],
    maps: Sequence[Float[Array, "b f h w c"]],
    weights: Float[Array, "b n"],
    positions: Float[Array, "b f h w"],
    form: str,
) -> Float[Array, " b"]:
    """How far maps and their weights are from a target: a mean over channels and weighted positions.

    Form "A" is |target - sum_n w_n maps_n|^2, form "B" sum_n w_n |target - maps_n|^2; where the weights
    sum to one, A is at most B (the square is convex). In float32; without positions it is 0.
    """
    target = target.astype(jnp.float32)
    if form == "A":
        error = jnp.mean((target - combine(maps, weights)) ** 2, -1)
    else:
        error = jnp.zeros_like(positions)
        for n, x in enumerate(maps):
            square = (target - x.astype(jnp.float32)) ** 2
            error = error + weights[:, n, None, None, None] * jnp.mean(square, -1)
    total = jnp.sum(positions, (1, 2, 3))
    return jnp.sum(error * positions, (1, 2, 3)) / jnp.maximum(total, 1)
