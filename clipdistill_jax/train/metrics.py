"""Metrics as (sum, count) pairs: any split of a batch, over chunks, steps or hosts, gives the same mean."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Pair = tuple[Any, Any]  # (sum, count), scalars


def mean(values: Array, mask: Array | None = None) -> Pair:
    """The pair of per-example `values` [...]; `mask` [...] bool (or weights), None counts every value.

    A masked value may be anything, NaN included: it is not touched.
    """
    values = values.astype(jnp.float32)
    if mask is None:
        return values.sum(), jnp.float32(values.size)
    weights = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
    return jnp.where(weights > 0, values * weights, 0.0).sum(), weights.sum()


def scalar(value: Any) -> Pair:
    """A number that stands for one step."""
    return jnp.asarray(value, jnp.float32), jnp.float32(1)


def merge(many: Iterable[Mapping[str, Pair]]) -> dict[str, Pair]:
    """Adds pairs by name, on the host, in float64."""
    total: dict[str, Pair] = {}
    for metrics in many:
        for name, (value, count) in metrics.items():
            old = total.get(name, (0.0, 0.0))
            total[name] = (old[0] + np.float64(value), old[1] + np.float64(count))
    return total


def finalize(metrics: Mapping[str, Pair]) -> dict[str, float]:
    """name -> mean. A metric that counted nothing is NaN."""
    return {name: float(value / count) if count else float("nan") for name, (value, count) in metrics.items()}
