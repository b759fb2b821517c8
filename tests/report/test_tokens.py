"""The scores of words as the report shows them, against the term that distils them."""

import base64
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.distill import TokenKD
from clipdistill_jax.models.features import Features
from clipdistill_jax.report.table import markdown
from clipdistill_jax.report.tokens import WordScores, score_words, token_picture, token_section, token_table

WORDS = ["she", "sends", "a", "telegram", ".", "now"]


def example(seed=0, slots=8, real=5):
    """An image, a text's word vectors, their mask and importance; of the words the last is cut off."""
    rng = np.random.default_rng(seed)
    mask = np.arange(slots) < real
    importance = np.zeros(slots, np.float32)
    importance[[1, 3]] = 0.4, 0.6
    image, words = rng.normal(size=7), rng.normal(size=(slots, 7))
    return image.astype(np.float32), words.astype(np.float32), mask, importance


@pytest.mark.parametrize("count,content_only", [(2, False), (3, True), (9, False)])
def test_the_shown_words_are_those_that_are_distilled(count, content_only):
    image, vectors, mask, importance = example(1)
    scores = score_words(WORDS, image, vectors, mask, importance, count, content_only)
    assert scores.words == tuple(WORDS[:5])
    assert scores.relevance.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scores.importance, [0, 0.4, 0, 0.6, 0], atol=1e-6)
    assert scores.chosen.sum() == min(count, 2 if content_only else 5)
    assert scores.total[scores.chosen].min() >= scores.total[~scores.chosen].max(initial=0)
    # The distance of word w is 10^w.
    theirs = np.zeros((8, 7), np.float32)
    theirs[:, 0] = 10.0 ** np.arange(8)
    teacher = Features(
        image=jnp.asarray(image)[None],
        words=jnp.asarray(vectors)[None],
        word_mask=jnp.asarray(mask)[None],
        importance=jnp.asarray(importance)[None],
    )
    student = teacher.replace(words=teacher.words + theirs)
    term = TokenKD(count=count, content_only=content_only)
    expected = sum(10.0 ** np.flatnonzero(scores.chosen))
    found = jax.jit(term.apply)({}, student, teacher, jnp.ones(1, bool))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_the_table_has_a_row_a_word():
    scores = WordScores(
        ("red", "*", "dog"),
        np.array([0.25, 0.0, 0.75]),
        np.array([0.5, 0.0, 0.5]),
        np.array([False, False, True]),
    )
    lines = markdown(token_table(scores)).splitlines()
    assert lines[0] == "| Word | Selected | Visual relevance | Importance | Sum |"
    assert lines[2:] == [
        "| red |  | 0.250 | 0.500 | 0.750 |",
        r"| \* |  | 0.000 | 0.000 | 0.000 |",
        "| dog | yes | 0.750 | 0.500 | 1.250 |",
    ]


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))


def test_the_picture_shows_scores_and_selection():
    scores = score_words(WORDS, *example(1))
    picture = token_picture(scores)
    for image in (picture.light, picture.dark):
        shown = pixels(image)
        assert shown.shape == (picture.height, picture.width, 3)
        assert 0.02 < (shown != shown[0, 0]).any(-1).mean() < 0.9
    best = scores.words[int(scores.total.argmax())]
    assert "“she sends a telegram .”" in picture.alt and f"Selected: “{best}” (" in picture.alt
    assert token_picture(scores) == picture
    none = WordScores(scores.words, scores.relevance, scores.importance, np.zeros(5, bool))
    assert token_picture(none).light != picture.light and "Selected: none." in token_picture(none).alt


def test_long_texts_are_cut_and_empty_ones_refused():
    count = 40
    long = WordScores(
        tuple(f"word{i}" for i in range(count)),
        np.full(count, 1 / count),
        np.zeros(count),
        np.arange(count) < 2,
    )
    alt = token_picture(long).alt
    assert "word31”" in alt and "word32" not in alt
    with pytest.raises(ValueError, match="nothing to draw"):
        token_picture(score_words([], *example()))


def test_a_section_has_a_panel_an_example():
    scores = score_words(WORDS, *example())
    section = token_section({"train-0, answer 2": scores, "train-7, answer 0": scores})
    assert [panel.heading for panel in section.panels] == ["train-0, answer 2", "train-7, answer 0"]
    assert section.panels[0].picture == token_picture(scores)
