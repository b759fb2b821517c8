"""Points over seeds by hand, marks of equal cost, and what is drawn of them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report.tradeoff import Point, cost_points, side_by_side, tradeoff


def result(recall, total=1_500_000, flops=2e9):
    return {"test": {"t2v_R@1": recall}, "sizes": {"total": total, "flops_clip": flops}}


def test_mean_and_deviation_over_seeds():
    rows = {"teacher": [result(44.5, 150_000_000, 5e10)], "SAB": [result(r) for r in (36.0, 38.0, 40.0)]}
    teacher, sab = cost_points(rows, "t2v_R@1")
    assert (teacher.mean, teacher.deviation) == (44.5, 0)
    assert (sab.mean, sab.deviation) == (38, 2)
    assert (sab.label, sab.index, sab.parameters, sab.flops) == ("SAB", 1, 1_500_000, 2e9)


def test_models_of_other_sizes_are_no_seeds():
    with pytest.raises(ValueError, match="SAB has 1,500,000 parameters with one seed, 1,600,000"):
        cost_points({"SAB": [result(1.0), result(1.0, 1_600_000)]}, "t2v_R@1")


def test_equal_costs_stand_side_by_side_in_a_band():
    places, bands = side_by_side([4e9, 1e9, 4e9, 9e9, 4e9], 1000.0)
    step = 1000**0.035
    np.testing.assert_allclose(places, [4e9 / step, 1e9, 4e9, 9e9, 4e9 * step], rtol=1e-9)
    np.testing.assert_allclose(bands, [(4e9 / step**1.7, 4e9 * step**1.7)], rtol=1e-9)
    places, _ = side_by_side([1.0] * 16 + [1.02], 1000.0)  # many share 0.15 of the axis
    np.testing.assert_allclose(places, [*(1000 ** (0.01 * (k - 7.5)) for k in range(16)), 1.02], rtol=1e-9)


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.light))).convert("RGB"))


@pytest.mark.parametrize("cost", ["flops", "parameters"])
def test_the_picture(cost):
    points = [
        Point("teacher", 0, 5e10, 150_000_000, (44.5,)),
        Point("alone", 1, 2e9, 1_500_000, (25.0, 27.0)),
        Point("SAB", 2, 2e9, 1_500_000, (37.0, 39.0)),
    ]
    picture = tradeoff(points, [(1, 2)], "Text to video R@1", cost)
    shown = pixels(picture)
    assert shown.shape == (picture.height, picture.width, 3)
    assert 0.01 < (shown != shown[0, 0]).any(-1).mean() < 0.3
    assert tradeoff(points, [(1, 2)], "Text to video R@1", cost) == picture
    at = "50 GFLOPs" if cost == "flops" else "150M parameters"
    assert f"teacher: 44.5% at {at}" in picture.alt
    assert "SAB: 38.0% ± 1.4 over 2 seeds" in picture.alt
    # Without a deviation the same means are drawn without bars.
    bare = [Point(p.label, p.index, p.flops, p.parameters, (p.mean,)) for p in points]
    without = pixels(tradeoff(bare, [(1, 2)], "Text to video R@1", cost))
    assert (shown != without).any(-1).sum() > 50


def test_marks_and_colours_tell_twelve_models_apart():
    points = [Point(str(i), i, 1e9, 10**6, (float(i),)) for i in range(12)]
    one, other = (pixels(tradeoff([points[i]], [], "R@1")) for i in (0, 6))
    assert (one != other).any()  # beside the label: the mark itself
    top = slice(int(0.2 * len(one)), None)
    assert (one[top] != other[top]).any()
