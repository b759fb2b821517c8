"""The frozen teacher: a model, its variables and the fingerprint that ties a run to them."""

from __future__ import annotations

import hashlib
from typing import Any

import flax
import flax.linen as nn
import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Teacher:
    """A model whose variables are an argument of the step and are never trained, returned or saved."""

    variables: Any
    model: nn.Module = flax.struct.field(pytree_node=False)
    fingerprint: str = flax.struct.field(pytree_node=False)


def fingerprint(variables: Any) -> str:
    """First 16 hex digits of the SHA-256 of every leaf's path, shape, dtype and bytes, in path order."""
    digest = hashlib.sha256()
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables), sep="/")
    for path in sorted(flat):
        leaf = np.asarray(jax.device_get(flat[path]))
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
