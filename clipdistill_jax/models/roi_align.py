"""RoI-align: what a feature map says within a box, without rounding the box to its cells.

Sources: He et al. 2017, Mask R-CNN, section 3; pytorch/vision torchvision/csrc/ops/cpu/roi_align_kernel.cpp.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipdistill_jax.models.image import AnyArray


def roi_align(
    features: Float[AnyArray, "b h w c"],
    boxes: Float[AnyArray, "b m 4"],
    *,
    output_size: int = 7,
    sampling_ratio: int = 2,
    spatial_scale: float | int = 1,
) -> Float[Array, "b m {output_size} {output_size} c"]:
    """The same numbers as torchvision.ops.roi_align(..., aligned=True).

    A box is cut into `output_size` x `output_size` bins; a bin is the mean of bilinear samples of the map,
    `sampling_ratio` along each side. A sample more than one cell outside the map counts as zero; nearer ones
    are moved onto its edge. Bilinear weights of a regular grid of samples factor into rows and columns, so
    this is two matrix products and no gathers.

    Args:
      features: B maps.
      boxes: M boxes of each map, x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; a box without extent is a point.
      output_size: bins along each side.
      sampling_ratio: samples of a bin along each side, at least 1. (torchvision's "as many as needed", 0 or
        less, would be another shape for every box.)
      spatial_scale: cells of the map in a unit of the boxes, e.g. 1 / 32.

    Raises:
      ValueError: output_size or sampling_ratio is below 1.
    """
    if output_size < 1 or sampling_ratio < 1:
        raise ValueError(
            f"output_size={output_size} and sampling_ratio={sampling_ratio} should be at least 1"
        )
    features = jnp.asarray(features)
    # Cell k covers k to k + 1 and its value stands at its centre, k + 0.5.
    corners = jnp.asarray(boxes, jnp.float32) * spatial_scale - 0.5
    height, width = features.shape[1:3]
    rows = _weights(corners[..., 1], corners[..., 3], height, output_size, sampling_ratio)
    columns = _weights(corners[..., 0], corners[..., 2], width, output_size, sampling_ratio)
    exact = jax.lax.Precision.HIGHEST  # a TPU would round positions to bfloat16
    pooled = jnp.einsum("bmph,bmqw,bhwc->bmpqc", rows, columns, features.astype(jnp.float32), precision=exact)
    return pooled.astype(features.dtype)


def _weights(
    start: Float[Array, "b m"], end: Float[Array, "b m"], size: int, bins: int, samples: int
) -> Float[Array, "b m {bins} {size}"]:
    """How much each of a map's rows (or columns) is of each bin."""
    steps = (jnp.arange(bins * samples) + 0.5) / (bins * samples)
    at = start[..., None] + (end - start)[..., None] * steps
    inside = (at >= -1) & (at <= size)
    at = jnp.clip(at, 0, size - 1)
    hat = jnp.maximum(0, 1 - jnp.abs(at[..., None] - jnp.arange(size))) * inside[..., None]
    return hat.reshape(*start.shape, bins, samples, size).mean(axis=-2)
