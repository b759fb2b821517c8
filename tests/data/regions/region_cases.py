"""Regions of made-up images, as arrays, and comparisons with them."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.regions import Regions

SIZE = (640.0, 480.0)
HALF = {"rtol": 2**-10, "atol": 2**-10 * 640}  # half precision has 11 bits; boxes are fractions of 640


def arrays(n: int = 5, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Features and boxes in pixels of a 640 x 480 image, the best first."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.5, (n, 2)) * SIZE
    high = low + rng.uniform(0.05, 0.5, (n, 2)) * SIZE
    return {
        "features": rng.normal(size=(n, width)).astype(np.float32),
        "boxes": np.concatenate([low, high], 1).astype(np.float32),
        "conf": np.sort(rng.uniform(0.05, 0.95, n))[::-1].astype(np.float32),
        "soft_labels": rng.dirichlet(np.ones(7), n).astype(np.float32),
    }


def uniter_arrays(n: int = 5, width: int = 8, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """The same as UNITER's npz has them: half precision, boxes as fractions, with extent; conf [n, 1]."""
    found = arrays(n, width, seed)
    norm = found.pop("boxes") / np.array(SIZE * 2, np.float32)
    found["norm_bb"] = np.concatenate([norm, norm[:, 2:] - norm[:, :2]], 1)
    found["conf"] = found["conf"][:, None]
    return {k: v.astype(np.float16) for k, v in found.items()} | changes


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def write_lmdb(folder: Path, values: dict[str, bytes], names: bytes | None = None) -> Path:
    """An image database of UNITER; `names`: what it says of its keys, if not all of them."""
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as txn:
        for name, value in values.items():
            txn.put(name.encode(), value)
        txn.put(b"__keys__", json.dumps(list(values)).encode() if names is None else names)
    return folder


def check_same(found: Regions, expected: dict[str, np.ndarray], **tolerance) -> None:
    np.testing.assert_allclose(found.features, expected["features"], **tolerance)
    np.testing.assert_allclose(found.boxes, expected["boxes"], **tolerance)
    assert found.features.dtype == found.boxes.dtype == np.float32
    assert not found.ground_truth.any() and len(found) == len(expected["features"])


def real(shared_data: Path) -> dict[str, np.ndarray]:
    """36 regions of a COCO image, with boxes in its pixels."""
    found = np.load(shared_data / "vqa_v2_mini/COCO_train2014_000000458752.npz")
    boxes = found["boxes"] * np.float32(0.6)
    conf = np.linspace(1, 0.1, 36, dtype=np.float32)
    return {"features": found["features"].astype(np.float32), "boxes": boxes, "conf": conf}
