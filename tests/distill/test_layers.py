"""Choosing, resizing, masking and weighing feature maps, against torch and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill.layers import (
    choose_layers,
    depth_mask,
    layer_weights,
    position_weights,
    spread_layers,
    to_grid,
)
from tests.distill.layer_cases import jit, slow_grid


def test_layers_that_are_not_there_are_refused():
    assert choose_layers("sab", "teacher", (-1, 0), 12) == (11, 0)
    assert choose_layers("sab", "teacher", (), 3) == (0, 1, 2)
    with pytest.raises(ValueError, match="'sab': student_layers has 5, but the student has 5 layers: 0 to 4"):
        choose_layers("sab", "student", (0, 5), 5)
    with pytest.raises(ValueError, match="gives none"):
        choose_layers("sab", "student", (), 0)


def test_pairs_are_spread_evenly():
    assert spread_layers(4, 12) == (2, 5, 8, 11)  # TinyBERT: every third
    assert spread_layers(5, 12) == (2, 4, 7, 9, 11)
    assert spread_layers(3, 2) == (0, 1, 1)


@pytest.mark.parametrize("side", [7, 6, 3, 1])
def test_coarser_grids_are_torchs_adaptive_average(side):
    torch = pytest.importorskip("torch", reason="parity with torch's resizing")
    F = torch.nn.functional
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 7, 3)).astype(np.float32)
    expected = F.adaptive_avg_pool2d(torch.from_numpy(x[:, 0]).permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    ours = jit(to_grid, static_argnums=(1, 2))(x, side, side)
    np.testing.assert_allclose(ours[:, 0], expected.numpy(), atol=1e-6)


def test_finer_grids_are_torchs_bilinear_interpolation():
    torch = pytest.importorskip("torch", reason="parity with torch's resizing")
    F = torch.nn.functional
    x = np.random.default_rng(0).normal(size=(2, 1, 3, 2, 3)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x[:, 0]).permute(0, 3, 1, 2), (7, 4), mode="bilinear")
    ours = to_grid(jnp.asarray(x), 7, 4)[:, 0]
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_bfloat16_maps_are_averaged_and_compared_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 9, 9, 2)), jnp.bfloat16)
    ours = jit(to_grid, static_argnums=(1, 2))(x, 3, 3)
    assert ours.dtype == jnp.float32
    expected = slow_grid(np.asarray(x[0, 0], np.float64), 3)
    np.testing.assert_allclose(ours[0, 0], expected, atol=1e-6)


def test_depth_mask_by_hand():
    expected = [[1, 0, 0]] * 4 + [[1, 1, 0]] * 4 + [[1, 1, 1]] * 4
    np.testing.assert_array_equal(depth_mask(range(12), (2, 3, 4)), np.array(expected, bool))
    np.testing.assert_array_equal(depth_mask((7,), (4, 2)), [[True, True]])
    # Depth counts, not the order in which layers are named.
    np.testing.assert_array_equal(depth_mask((11, 0), (4, 2)), [[True, True], [False, True]])


def test_top_k_keeps_exactly_k_even_of_equal_scores():
    weights = np.asarray(layer_weights(jnp.zeros((1, 2, 5)), top_k=3))
    assert ((weights > 0).sum(-1) == 3).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_positions_are_dropped_at_their_rate():
    rate = np.asarray(position_weights(jnp.ones((9, 9), bool), 9, 9, jax.random.key(0), 0.25)).mean()
    assert abs(rate - 0.75) < 0.03  # 6561 draws: five standard errors
