"""Fits of teacher layers against slow least squares on explicit rows, and planted teachers."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report.reconstruction import (
    common_grid,
    halves,
    moments,
    reconstruct,
    residual_bars,
    weight_maps,
)

NO_TWINS = np.zeros((0, 2), int)
CLIPS, FRAMES, GRID = 200, 2, 2
WIDTHS = (4, 6, 5)  # of the student's layers, the first on a finer grid


def student_layers(seed=0):
    rng = np.random.default_rng(seed)
    sides = (2 * GRID, GRID, GRID)
    return [
        (rng.normal(size=(CLIPS, FRAMES, side, side, c)) * 10**i + i).astype(np.float32)
        for i, (side, c) in enumerate(zip(sides, WIDTHS, strict=True))
    ]


def pool(layer):
    """2 x 2 means of the finer layer; the others are as they are."""
    n, f, h, _, c = layer.shape
    k = h // GRID
    return layer.reshape(n, f, GRID, k, GRID, k, c).mean((3, 5))


def combined(layers, weights, bias=3.0):
    return sum(pool(x) @ w for x, w in zip(layers, weights, strict=True)) + np.float32(bias)


def mixing(seed, width=7, used=(0, 1, 2)):
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=(c, width)) / 10**i for i, c in enumerate(WIDTHS)]
    return [(w if i in used else 0 * w).astype(np.float32) for i, w in enumerate(made)]


def fits(student, teacher, mask=None, fit=None, **settings):
    mask = np.ones((CLIPS, FRAMES), bool) if mask is None else mask
    fit = halves(CLIPS, NO_TWINS) if fit is None else fit
    parts = [
        moments([x[half] for x in student], [x[half] for x in teacher], mask[half], GRID)
        for half in (fit, ~fit)
    ]
    widths = [[x.shape[-1] for x in layers] for layers in (student, teacher)]
    return reconstruct(*parts, *widths, **settings)


def slow(student, teacher, mask, fit, ridge):
    """The same from rows: ridge as least squares with rows of the penalty below."""

    def rows(layer, half):
        return pool(layer)[half][mask[half]].reshape(-1, layer.shape[-1]).astype(np.float64)

    residual, weights, nearest = [], [], []
    for target in teacher:
        y, y_held = rows(target, fit), rows(target, ~fit)
        scale = np.sqrt(y.var(0).mean())
        found = {}
        for used in [(0, 1, 2), (0,), (1,), (2,)]:
            x = [rows(student[i], fit) for i in used]
            held = [rows(student[i], ~fit) for i in used]
            scales = [np.sqrt(block.var(0).mean()) for block in x]
            means = [block.mean(0) for block in x]
            x, held = (
                np.concatenate([(b - m) / s for b, m, s in zip(blocks, means, scales, strict=True)], 1)
                for blocks in (x, held)
            )
            penalty = np.sqrt(ridge * len(x)) * np.eye(x.shape[1])
            aim = np.concatenate([(y - y.mean(0)) / scale, np.zeros((x.shape[1], y.shape[1]))])
            w = np.linalg.lstsq(np.concatenate([x, penalty]), aim, rcond=None)[0]
            left = (y_held - y.mean(0)) / scale - held @ w
            spread = ((y_held - y_held.mean(0)) / scale) ** 2
            on_fitted = (((y - y.mean(0)) / scale - x @ w) ** 2).sum()
            found[used] = (left**2).sum() / spread.sum(), on_fitted, x, w
        residual.append([found[used][0] for used in found])
        nearest.append(np.argmin([found[(i,)][1] for i in range(3)]))
        _, _, x, w = found[0, 1, 2]
        ends = np.cumsum((0, *WIDTHS))
        parts = [x[:, a:b] @ w[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        weights.append([np.sqrt((part**2).sum() / (((y - y.mean(0)) / scale) ** 2).sum()) for part in parts])
    return np.array(residual), np.array(weights), nearest


def test_against_least_squares_on_rows():
    student, rng = student_layers(), np.random.default_rng(5)
    noise = rng.normal(size=(CLIPS, FRAMES, GRID, GRID, 7)).astype(np.float32)
    teacher = [combined(student, mixing(1)) + noise, 2 * noise + combined(student, mixing(2, used=(1,)))]
    mask = rng.uniform(size=(CLIPS, FRAMES)) < 0.8
    fit = rng.uniform(size=CLIPS) < 0.6
    found = fits(student, teacher, mask, fit, ridge=0.02)
    residual, weights, nearest = slow(student, teacher, mask, fit, ridge=0.02)
    # Sums in float64 of values of 1e2: what is taken off again leaves 1e-10.
    np.testing.assert_allclose(found.residual, residual[:, 0], rtol=1e-8)
    np.testing.assert_allclose(found.single, residual[:, 1:], rtol=1e-8)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-7)
    assert found.nearest.tolist() == nearest and found.nearest[1] == 1
    np.testing.assert_array_equal(found.best_single, found.single[[0, 1], found.nearest])


def test_a_teacher_in_the_span_is_left_nothing_and_one_outside_everything():
    student, rng = student_layers(), np.random.default_rng(6)
    outside = rng.normal(size=(CLIPS, FRAMES, GRID, GRID, 7)).astype(np.float32)
    teacher = [combined(student, mixing(1)), combined(student, mixing(2, used=(2,))), outside]
    found = fits(student, teacher, ridge=1e-9)
    assert found.residual[:2].max() < 1e-9  # float32 layers: 1e-7 relative, squared
    assert found.residual[2] == pytest.approx(1 + 15 / 800, abs=0.02)  # 15 weights from 800 rows
    assert found.best_single[0] > 0.3  # a mixture of three needs all of them
    assert found.best_single[1] < 1e-9 and found.nearest[1] == 2
    np.testing.assert_allclose(found.weights[1], [0, 0, 1], atol=1e-6)
    # The default penalty costs little.
    assert fits(student, teacher[:2]).residual.max() < 1e-5


def test_masked_frames_count_for_nothing():
    student = student_layers()
    teacher = [combined(student, mixing(1))]
    mask = np.ones((CLIPS, FRAMES), bool)
    mask[::2, 1] = False
    expected = fits(student, teacher, mask)
    for layer in (*student, *teacher):
        layer[::2, 1] = 1e3
    np.testing.assert_array_equal(fits(student, teacher, mask).residual, expected.residual)
    assert fits(student, teacher).residual[0] != pytest.approx(expected.residual[0])


def test_moments_add_up_over_clips():
    student, mask = student_layers(), np.ones((CLIPS, FRAMES), bool)
    teacher = [combined(student, mixing(1))]
    whole = moments(student, teacher, mask, GRID)
    halfway = [
        moments([x[part] for x in student], [x[part] for x in teacher], mask[part], GRID)
        for part in (slice(0, 7), slice(7, 7), slice(7, None))
    ]
    total = halfway[0] + halfway[1] + halfway[2]
    assert total.count == whole.count == CLIPS * FRAMES * GRID**2
    for name in ("x", "y", "xx", "xy", "yy"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-9, atol=1e-6)


def test_a_dead_student_layer_adds_nothing_and_a_dead_teacher_layer_is_an_error():
    student = student_layers()
    teacher = [combined(student, mixing(1, used=(1,)))]
    student[2][:] = 5.1
    found = fits(student, teacher)
    assert found.weights[0, 2] < 1e-6 and found.residual[0] < 1e-5
    assert found.single[0, 2] == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="teacher layer 1"):
        fits(student, [*teacher, np.full_like(teacher[0], 0.3)])


def test_the_grid_is_the_coarsest():
    maps = [np.zeros((1, 1, *side, 3)) for side in ((8, 8), (7, 9), (14, 14))]
    assert common_grid(maps) == 7


def test_twins_are_on_one_side():
    fit = halves(10, np.array([(0, 1), (4, 9), (7, 3), (8, 12)]))
    assert fit.tolist() == [True, True, True, False, True, False, False, False, False, True]
    assert halves(3, NO_TWINS).tolist() == [True, True, False]
    for clips, twins in ((1, NO_TWINS), (2, np.array([(0, 1)]))):
        with pytest.raises(ValueError, match="cannot be split"):
            halves(clips, twins)


@pytest.mark.parametrize("draw", [lambda found: residual_bars(found, {"TAB": 2, "SAB": 3}), weight_maps])
def test_pictures(draw):
    student = student_layers()
    noise = np.random.default_rng(7).normal(size=(CLIPS, FRAMES, GRID, GRID, 7)).astype(np.float32)
    teacher = [combined(student, mixing(k)) + k * noise for k in range(5)]
    found = {"TAB": fits(student, teacher), "SAB": fits(student, teacher, ridge=0.5)}
    picture = draw(found)
    for image in (picture.light, picture.dark):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))
        assert shown.shape == (picture.height, picture.width, 3)
        assert 0.05 < (shown != shown[0, 0]).any(-1).mean() < 0.9
    assert draw(found) == picture
    assert "TAB" in picture.alt and "SAB" in picture.alt
    assert draw({"TAB": found["SAB"], "SAB": found["TAB"]}).light != picture.light
