"""Retrieval metrics by hand, against sorting, and with ties and several captions."""

import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.evaluate.retrieval import (
    embed,
    pair_accuracy,
    rank_metrics,
    retrieval_metrics,
    score_matrix,
)
from clipdistill_jax.models.features import Features


def test_by_hand():
    scores = np.array([[9.0, 1, 2], [5, 4, 3], [0, 2, 1]])  # ranks 1, 2, 2
    found = rank_metrics(scores, np.arange(3), "t2v")
    assert found["t2v_R@1"] == pytest.approx(100 / 3)
    assert found["t2v_R@5"] == 100
    assert found["t2v_MdR"] == 2 and found["t2v_MnR"] == pytest.approx(5 / 3)


def test_against_sorting():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(40, 30)), rng.integers(0, 30, 40)
    ranks = [1 + list(np.argsort(-row)).index(t) for row, t in zip(scores, target, strict=True)]
    found = rank_metrics(scores, target, "x")
    for k in (1, 5, 10):
        assert found[f"x_R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k))
    assert found["x_MdR"] == np.median(ranks) and found["x_MnR"] == pytest.approx(np.mean(ranks))


def test_ties_are_shared_in_expectation():
    found = rank_metrics(np.zeros((4, 4)), np.arange(4), "x")  # every order equally likely
    assert found["x_R@1"] == 25 and found["x_R@5"] == 100 and found["x_MnR"] == 2.5
    one = rank_metrics(np.array([[1.0, 1.0, 0.0]]), np.array([0]), "x")
    assert one["x_R@1"] == 50 and one["x_MnR"] == 1.5


def test_several_captions_a_clip():
    # Clip 0 has captions 0 and 1, clip 1 has caption 2.
    scores = np.array([[1.0, 5.0], [9.0, 0.0], [2.0, 3.0]])
    found = retrieval_metrics(scores, np.array([0, 0, 1]))
    assert found["t2v_R@1"] == pytest.approx(200 / 3)
    # v2t: clip 0's captions score max(1, 9) = 9 against clip 0 and clip 1's 2; clip 1 sees max(5, 0) and 3.
    assert found["v2t_R@1"] == 50 and found["v2t_MnR"] == 1.5


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 queries are not finite"):
        rank_metrics(np.array([[np.nan, 1.0], [0.0, 1.0]]), np.arange(2), "x")


def test_pair_accuracy_counts_ties_as_half():
    scores = np.array([[2.0, 1.0, 7.0], [3.0, 3.0, 7.0], [0.0, 0.0, 1.0]])
    assert pair_accuracy(scores, np.arange(3), [(0, 1)]) == 75
    with pytest.raises(ValueError, match="belongs to a pair"):
        pair_accuracy(scores, np.arange(3), [])


def test_embed_drops_padding_and_keeps_order():
    batches = [
        {"x": np.array([[1.0], [2.0]]), "mask": np.array([True, True])},
        {"x": np.array([[3.0], [0.0]]), "mask": np.array([True, False])},
    ]
    found = embed(lambda batch: Features(text=jnp.asarray(batch["x"])), batches, dict)
    np.testing.assert_array_equal(found.text, [[1], [2], [3]])
    with pytest.raises(ValueError, match="no batches"):
        embed(lambda batch: Features(), [], dict)


def test_score_matrix_is_the_same_for_any_block():
    rng = np.random.default_rng(0)
    text, video = Features(text=rng.normal(size=(7, 3))), Features(video=rng.normal(size=(4, 3)))
    expected = text.text @ video.video.T
    for block in (1, 3, 7, 100):
        found = score_matrix(lambda t, v: t.text @ v.video.T, text, video, block)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
