"""Ranks and the choices between motion twins, against the evaluator's own metrics and small cases by hand."""

import numpy as np
import pytest

from clipdistill_jax.report import figures
from clipdistill_jax.report.gallery import choose
from clipdistill_jax.report.scores import Scores, read_scores
from tests.report import fake_run


def made(matrix, clip_of_text=None, pairs=(), kinds=()):
    matrix = np.asarray(matrix, np.float32)
    return Scores(
        scores=matrix,
        video_ids=[f"video{i}" for i in range(matrix.shape[1])],
        captions=[f"caption {i}" for i in range(matrix.shape[0])],
        clip_of_text=np.arange(len(matrix)) if clip_of_text is None else np.asarray(clip_of_text),
        pairs=np.asarray(pairs, np.int32).reshape(-1, 2),
        kinds=list(kinds),
    )


@pytest.fixture
def stored(tmp_path):
    arrays = fake_run.scores("student")
    np.savez(tmp_path / "scores.npz", **arrays)
    return read_scores(tmp_path / "scores.npz"), fake_run.result("student", arrays)["test"]


def test_no_file(tmp_path):
    assert read_scores(tmp_path / "scores.npz") is None


def test_ranks_and_choices_agree_with_the_metrics(stored):
    scores, test = stored
    ranks = scores.ranks()
    assert np.median(ranks) == test["t2v_MdR"] and ranks.mean() == pytest.approx(test["t2v_MnR"], rel=1e-12)
    assert 100 * scores.preference().right.mean() == pytest.approx(test["motion_pairs"], rel=1e-12)


def test_ties():
    scores = made([[1, 1, 0], [0, 0, 0], [3, 2, 1]], pairs=[(0, 1)], kinds=["order"])
    assert scores.ranks().tolist() == [1.5, 2, 3]
    assert scores.preference().right.tolist() == [0.5, 0.5]
    assert scores.best(0, 2) == [0, 1]


def test_several_captions_a_clip():
    # Clip 2 is the first of the pair, clip 0 the second; caption 1 belongs to no pair.
    matrix = [[5, 0, 1], [0, 1, 0], [4, 0, 1], [1, 0, 4]]
    scores = made(matrix, clip_of_text=[0, 1, 2, 2], pairs=[(2, 0)], kinds=["size"])
    preference = scores.preference()
    assert preference.text.tolist() == [0, 2, 3]
    assert preference.side.tolist() == [1, 0, 0]
    assert preference.right.tolist() == [1, 0, 1]
    assert scores.twins().tolist() == [2, -1, 0]
    # Of the first clip's two captions one finds it; the second clip's caption finds its own.
    assert figures.confusion(scores).tolist() == [[50, 50], [0, 100]]


def test_a_model_that_always_prefers_the_first_clip_has_one_full_column():
    scores = made([[9, 1], [9, 1]], pairs=[(0, 1)], kinds=["order"])
    assert figures.confusion(scores).tolist() == [[100, 0], [100, 0]]


def test_queries_are_spread_over_the_ranks_and_end_with_pairs(stored):
    scores, _ = stored
    chosen = list(choose(scores))
    assert chosen == list(choose(scores))
    singles = [text for text, kind in chosen if not kind]
    ranks = scores.ranks()
    outside = ranks[20:]  # the first 20 clips are twins
    assert len(singles) == 4 and min(singles) >= 20
    assert ranks[singles[0]] == outside.min() and ranks[singles[-1]] == outside.max()
    assert list(ranks[singles]) == sorted(ranks[singles])
    (right, first), (wrong, second) = chosen[4:]
    own = dict(zip(scores.preference().text.tolist(), scores.preference().right.tolist(), strict=True))
    assert (own[right], own[wrong]) == (1, 0) and right // 2 != wrong // 2 and first != second


def test_queries_without_pairs_and_of_a_tiny_split():
    assert list(choose(made(np.eye(3)))) == [(0, ""), (1, ""), (2, "")]
    only_twins = made(np.eye(2), pairs=[(0, 1)], kinds=["order"])
    assert list(choose(only_twins)) == [(0, "order")]
