"""The contrastive loss against slow NumPy, and its masks."""

import jax
import numpy as np

from clipdistill_jax.models.features import Features
from clipdistill_jax.tasks.retrieval import batch_accuracy, retrieval_task
from clipdistill_jax.tasks.retrieval import contrastive_loss as eager_loss

# Compiled once for all: every matrix here is 4 x 4.
contrastive_loss = jax.jit(eager_loss)
gradient_of = jax.jit(jax.grad(lambda s, valid: eager_loss(s, valid).sum()))


def slow_loss(s, valid):
    out = np.zeros(len(s))
    kept = np.flatnonzero(valid)
    for i in kept:
        row = np.log(np.exp(s[i, kept]).sum()) - s[i, i]
        column = np.log(np.exp(s[kept, i]).sum()) - s[i, i]
        out[i] = (row + column) / 2
    return out


def test_loss_is_the_symmetric_cross_entropy_of_valid_examples():
    s = np.random.default_rng(0).normal(size=(4, 4)) * 4
    for valid in (np.ones(4, bool), np.array([1, 0, 1, 1], bool)):
        found = contrastive_loss(np.float32(s), valid)
        np.testing.assert_allclose(found, slow_loss(s, valid), rtol=1e-5)


def test_two_by_two_by_hand():
    s = np.diag(np.full(4, np.log(3.0), np.float32))
    found = contrastive_loss(s, np.array([True, True, False, False]))
    np.testing.assert_allclose(found, [np.log(4 / 3)] * 2 + [0, 0], rtol=1e-6)


def test_an_invalid_example_changes_nothing_and_gets_no_gradient():
    s = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    valid = np.array([True, True, False, True])
    gradient = gradient_of(s, valid)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[2]) and not np.any(np.asarray(gradient)[:, 2])
    other = s.copy()
    other[2], other[:, 2] = 99.0, -99.0
    np.testing.assert_allclose(contrastive_loss(other, valid), contrastive_loss(s, valid))


def test_nothing_valid_gives_zero_not_nan():
    s, valid = np.ones((4, 4), np.float32), np.zeros(4, bool)
    np.testing.assert_array_equal(contrastive_loss(s, valid), 0)
    assert np.isfinite(gradient_of(s, valid)).all()


def test_a_clip_without_frames_does_not_count():
    features = Features(
        similarity=np.eye(3, dtype=np.float32), frame_mask=np.array([[1, 1], [0, 0], [1, 0]], bool)
    )
    _, valid, _ = jax.jit(retrieval_task)(features, {"mask": np.ones(3, bool)})
    np.testing.assert_array_equal(valid, [True, False, True])


def test_batch_accuracy():
    s = np.array([[2.0, 1.0, 9.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    accuracy = jax.jit(batch_accuracy)
    np.testing.assert_array_equal(accuracy(s, np.ones(3, bool)), [0, 0, 1])
    np.testing.assert_array_equal(accuracy(s, np.array([True, True, False])), [1, 0, 0])
