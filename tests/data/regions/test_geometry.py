"""The two geometries of boxes against their formulas."""

import math

import numpy as np
import pytest

from clipdistill_jax.data.regions.geometry import uniter_locations, vl_bert_geometry
from tests.data.regions.region_cases import SIZE, arrays


def slow_locations(box, size) -> list[float]:
    x1, y1, x2, y2 = box
    w, h = (x2 - x1) / size[0], (y2 - y1) / size[1]
    return [x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1], w, h, w * h]


def slow_geometry(box, size, waves) -> list[float]:
    x1, y1, x2, y2 = box
    out = []
    for value in (
        (x1 + x2) / 2 / size[0],
        (y1 + y2) / 2 / size[1],
        (x2 - x1) / size[0],
        (y2 - y1) / size[1],
    ):
        angles = [100 * value / 1000 ** (k / waves) for k in range(waves)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return out


def test_geometry_against_the_formulas():
    boxes = arrays(6)["boxes"]
    np.testing.assert_allclose(
        uniter_locations(boxes, SIZE), [slow_locations(b, SIZE) for b in boxes.astype(float)], rtol=1e-5
    )
    found = vl_bert_geometry(boxes, SIZE)
    assert found.shape == (6, 2048)
    # float64 inside, rounded once: 2**-24 of at most 1.
    np.testing.assert_allclose(found, [slow_geometry(b, SIZE, 256) for b in boxes.astype(float)], atol=1e-7)


def test_geometry_by_hand():
    boxes = np.array([[0, 0, 50, 100]], np.float32)
    np.testing.assert_allclose(uniter_locations(boxes, (100.0, 100.0)), [[0, 0, 0.5, 1, 0.5, 1, 0.5]])
    found = vl_bert_geometry(boxes, (100.0, 100.0), waves=2)[0]
    # Centre (25, 50), extent (50, 100) hundredths; waves divide by 1 and by sqrt(1000).
    assert found[:4] == pytest.approx(
        [math.sin(25), math.sin(25 / 1000**0.5), math.cos(25), math.cos(25 / 1000**0.5)], abs=1e-7
    )
    assert found[12] == pytest.approx(math.sin(100), abs=1e-7)
