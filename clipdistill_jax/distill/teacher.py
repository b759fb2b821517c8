"""The frozen teacher: its variables are an argument of the step; a run is tied to them by a fingerprint."""

import hashlib
from typing import Any

import flax
import jax
import numpy as np


def fingerprint(variables: Any) -> str:
    """First 16 hex digits of the SHA-256 of every leaf's path, shape, dtype and bytes, in path order."""
    digest = hashlib.sha256()
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    for path in sorted(flat):
        leaf = np.asarray(jax.device_get(flat[path]))
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
