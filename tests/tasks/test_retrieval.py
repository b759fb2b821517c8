"""The contrastive loss against slow NumPy, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.models.features import Features
from clipdistill_jax.tasks.retrieval import batch_accuracy, contrastive_loss, retrieval_task


def slow_loss(s, valid):
    out = np.zeros(len(s))
    kept = np.flatnonzero(valid)
    for i in kept:
        row = np.log(np.exp(s[i, kept]).sum()) - s[i, i]
        column = np.log(np.exp(s[kept, i]).sum()) - s[i, i]
        out[i] = (row + column) / 2
    return out


def test_loss_is_the_symmetric_cross_entropy_of_valid_examples():
    s = np.random.default_rng(0).normal(size=(6, 6)) * 4
    for valid in (np.ones(6, bool), np.array([1, 0, 1, 1, 0, 1], bool)):
        found = contrastive_loss(jnp.asarray(s, jnp.float32), jnp.asarray(valid))
        np.testing.assert_allclose(found, slow_loss(s, valid), rtol=1e-5)


def test_two_by_two_by_hand():
    s = jnp.array([[np.log(3.0), 0.0], [0.0, np.log(3.0)]], jnp.float32)
    np.testing.assert_allclose(contrastive_loss(s, jnp.ones(2, bool)), np.log(4 / 3), rtol=1e-6)


def test_an_invalid_example_changes_nothing_and_gets_no_gradient():
    s = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    valid = jnp.array([True, True, False, True])
    gradient = jax.grad(lambda s: contrastive_loss(s, valid).sum())(s)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[2]) and not np.any(np.asarray(gradient)[:, 2])
    np.testing.assert_allclose(
        contrastive_loss(s.at[2].set(99.0).at[:, 2].set(-99.0), valid), contrastive_loss(s, valid)
    )


def test_nothing_valid_gives_zero_not_nan():
    s = jnp.ones((3, 3))
    valid = jnp.zeros(3, bool)
    np.testing.assert_array_equal(contrastive_loss(s, valid), 0)
    assert np.isfinite(jax.grad(lambda s: contrastive_loss(s, valid).sum())(s)).all()


def test_a_clip_without_frames_does_not_count():
    features = Features(similarity=jnp.eye(3), frame_mask=jnp.array([[1, 1], [0, 0], [1, 0]], bool))
    _, valid, _ = retrieval_task(features, {"mask": jnp.array([True, True, True])})
    np.testing.assert_array_equal(valid, [True, False, True])


def test_batch_accuracy():
    s = jnp.array([[2.0, 1.0, 9.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(batch_accuracy(s, jnp.ones(3, bool)), [0, 0, 1])
    np.testing.assert_array_equal(batch_accuracy(s, jnp.array([True, True, False])), [1, 0, 0])
