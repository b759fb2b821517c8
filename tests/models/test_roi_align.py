"""RoI-align against its definition sample by sample, torch's grid_sample, and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.roi_align import roi_align

jitted = jax.jit(roi_align, static_argnames=("output_size", "sampling_ratio", "spatial_scale"))

# Within, across every edge, far outside, a point, thin, the whole map.
BOXES = np.array(
    [
        [1.2, 0.7, 5.9, 3.3],
        [-3.0, -2.5, 4.0, 2.0],
        [5.0, 3.0, 11.0, 8.5],
        [30.0, 30.0, 40.0, 44.0],
        [2.5, 2.5, 2.5, 2.5],
        [0.0, 1.0, 7.0, 1.1],
        [0.0, 0.0, 7.0, 5.0],
    ],
    np.float32,
)


def slow(features, box, size, samples, scale):
    """One map [h, w, C] and one box, from the definition."""
    h, w, c = features.shape
    x1, y1, x2, y2 = (float(v) * scale - 0.5 for v in box)
    out = np.zeros((size, size, c))
    for p in range(size):
        for q in range(size):
            for i in range(samples):
                for j in range(samples):
                    y = y1 + (y2 - y1) / size * (p + (i + 0.5) / samples)
                    x = x1 + (x2 - x1) / size * (q + (j + 0.5) / samples)
                    if y < -1 or y > h or x < -1 or x > w:
                        continue
                    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                    y0, x0 = int(y), int(x)
                    y3, x3 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
                    dy, dx = y - y0, x - x0
                    top = (1 - dx) * features[y0, x0] + dx * features[y0, x3]
                    bottom = (1 - dx) * features[y3, x0] + dx * features[y3, x3]
                    out[p, q] += ((1 - dy) * top + dy * bottom) / samples**2
    return out


@pytest.mark.parametrize(("size", "samples", "scale"), [(3, 2, 1), (1, 5, 0.5), (2, 1, 1.7)])
def test_equals_its_definition(size, samples, scale):
    maps = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    boxes = np.stack([BOXES, BOXES[::-1]])
    found = jitted(maps, boxes, output_size=size, sampling_ratio=samples, spatial_scale=scale)
    expected = [[slow(maps[b], box, size, samples, scale) for box in boxes[b]] for b in range(2)]
    assert found.shape == (2, len(BOXES), size, size, 3)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_equals_torchs_bilinear_samples():
    torch = pytest.importorskip("torch", reason="grid_sample is the reference")
    maps = np.random.default_rng(1).normal(size=(1, 6, 6, 4)).astype(np.float32)
    box = np.array([0.3, 1.1, 4.6, 5.2], np.float32)
    steps = (np.arange(8) + 0.5) / 8
    at_x, at_y = (box[k] - 0.5 + (box[k + 2] - box[k]) * steps for k in (0, 1))
    grid = np.stack(np.meshgrid(at_x, at_y), axis=-1)[None] * 2 / 5 - 1  # -1 and 1 are the outermost centres
    sampled = torch.nn.functional.grid_sample(
        torch.tensor(maps.transpose(0, 3, 1, 2)),
        torch.tensor(grid, dtype=torch.float32),
        padding_mode="border",
        align_corners=True,
    )
    expected = torch.nn.functional.avg_pool2d(sampled, 2)[0].permute(1, 2, 0).numpy()
    found = jitted(maps, box[None, None], output_size=4, sampling_ratio=2)
    np.testing.assert_allclose(found[0, 0], expected, atol=2e-6)


def test_by_hand():
    y, x = np.mgrid[:8, :8] + 0.5
    ramp = np.stack([x, y, np.full_like(x, 3)], axis=-1)[None].astype(np.float32)
    boxes = np.array([[[2, 1, 6, 5], [1.5, 3, 2.5, 3.25]]], np.float32)
    # A plane's mean over a box is its value at the middle; and by quarters, at the quarters' middles.
    one = jitted(ramp, boxes, output_size=1, sampling_ratio=4)[0, :, 0, 0]
    np.testing.assert_allclose(one, [[4, 3, 3], [2, 3.125, 3]], atol=1e-6)
    four = np.asarray(jitted(ramp, boxes[:, :1], output_size=2)[0, 0])
    np.testing.assert_allclose(four[..., 0], [[3, 5], [3, 5]], atol=1e-6)
    np.testing.assert_allclose(four[..., 1], [[2, 2], [4, 4]], atol=1e-6)
    # In units of 32 pixels.
    scaled = jitted(ramp, boxes * 32, output_size=1, sampling_ratio=4, spatial_scale=1 / 32)
    np.testing.assert_allclose(scaled[0, :, 0, 0], one, atol=1e-5)
    # A whole cell away from the map there is nothing; half a cell away, its edge.
    off = np.array([[[9.6, 4, 9.8, 4], [8.4, 4, 8.4, 4]]], np.float32)
    found = jitted(ramp, off, output_size=1, sampling_ratio=4)[0, :, 0, 0]
    np.testing.assert_allclose(found, [[0, 0, 0], [7.5, 4, 3]], atol=1e-6)


def test_gradient_and_dtype():
    maps = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    boxes = jnp.array([[[0.5, 0.5, 3.5, 3.5]]])
    assert jax.eval_shape(roi_align, maps, boxes).dtype == jnp.bfloat16

    def total(maps):
        return roi_align(maps, boxes, output_size=1, sampling_ratio=6).sum()

    grad = np.asarray(jax.jit(jax.grad(total))(np.ones((1, 4, 4, 2), np.float32)))
    np.testing.assert_allclose(grad.sum(), 2, rtol=1e-6)  # the samples' weights add up to 1 a channel
    with pytest.raises(ValueError, match="sampling_ratio=0"):
        roi_align(maps, boxes, sampling_ratio=0)
