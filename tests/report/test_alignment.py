"""Frame-word maps against slow loops, their agreement against np.corrcoef, and what is drawn of them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report.alignment import Maps, agreement, alignment_picture, frame_word_maps, spread

WORDS = ["a", "red", "circle", "moves", "left"]


def features(seed, n=4, f=3, w=5, d=8):
    """Vectors of n pairs, of which the first has all frames and words and the others fewer."""
    rng = np.random.default_rng(seed)
    frames, words = rng.normal(size=(n, f, d)), rng.normal(size=(n, w, d))
    frame_mask = np.arange(f) < np.array([f, f - 1, f, 1])[:n, None]
    word_mask = np.arange(w) < np.array([w, w, w - 2, 1])[:n, None]
    return frames.astype(np.float32), frame_mask, words.astype(np.float32), word_mask


def test_maps_are_cosines_where_frame_and_word_are_real():
    frames, frame_mask, words, word_mask = features(0)
    maps = frame_word_maps(frames, frame_mask, words, word_mask)
    for n, f, w in np.ndindex(4, 3, 5):
        a, b = frames[n, f].astype(float), words[n, w].astype(float)
        real = frame_mask[n, f] and word_mask[n, w]
        expected = a @ b / np.sqrt((a @ a) * (b @ b)) if real else 0
        assert maps.mask[n, f, w] == real
        assert maps.cosines[n, f, w] == pytest.approx(expected, abs=1e-6)  # float32


def test_zero_vectors_give_zero():
    frames, frame_mask, words, word_mask = features(0)
    frames[0, 0] = 0
    maps = frame_word_maps(frames, frame_mask, words, word_mask)
    assert (maps.cosines[0, 0] == 0).all() and np.isfinite(maps.cosines).all()


def test_agreement_is_the_correlation_of_the_real_cells():
    ours = frame_word_maps(*features(1))
    frames, frame_mask, words, word_mask = features(2, d=5)  # another width
    word_mask[0, 4] = False  # a word that one model does not have, as with another tokenizer
    theirs = frame_word_maps(frames, frame_mask, words, word_mask)
    found = agreement(ours, theirs)
    for n in range(3):
        both = ours.mask[n] & theirs.mask[n]
        expected = np.corrcoef(ours.cosines[n][both], theirs.cosines[n][both])[0, 1]
        assert found[n] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(found[3])  # a single cell


def test_agreement_sees_no_masked_cell():
    ours, theirs = frame_word_maps(*features(1)), frame_word_maps(*features(2))
    noise = np.random.default_rng(0).normal(size=ours.cosines.shape)
    changed = Maps(np.where(ours.mask, ours.cosines, noise), ours.mask)
    np.testing.assert_array_equal(agreement(changed, theirs), agreement(ours, theirs))


def test_a_map_agrees_with_itself_stretched_and_disagrees_with_its_opposite():
    maps = frame_word_maps(*features(3))
    for factor, expected in ((0.2, 1), (-0.5, -1)):
        other = Maps(factor * maps.cosines + 0.1, maps.mask)
        np.testing.assert_allclose(agreement(maps, other)[:3], expected, atol=1e-6)
    flat = Maps(np.full_like(maps.cosines, 0.3), maps.mask)
    assert np.isnan(agreement(maps, flat)).all()


def test_spread_goes_from_the_highest_to_the_lowest():
    values = np.array([0.1, np.nan, 0.9, 0.5, -0.3, 0.7])
    assert spread(values, 3).tolist() == [2, 3, 4]
    assert spread(values, 9).tolist() == [2, 5, 3, 0, 4]
    assert spread(np.array([np.nan]), 2).tolist() == []


def drawn(maps=("CLIP", "TAB", "SAB"), mask=None, frames=3, cosines=None, words=WORDS):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (frames, 16, 16, 3), np.uint8)
    mask = np.ones((frames, len(words)), bool) if mask is None else mask
    if cosines is None:
        cosines = rng.uniform(-1, 1, (len(maps), frames, len(words))).astype(np.float32)
    notes = {label: "r = 0.50" for label in maps[1:]}
    return alignment_picture(pixels, words, dict(zip(maps, cosines, strict=True)), mask, notes)


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))


def test_the_picture_is_a_png_with_frames_and_maps_and_the_same_each_time():
    picture = drawn()
    for image in (picture.light, picture.dark):
        shown = pixels(image)
        assert shown.shape == (picture.height, picture.width, 3)
        assert 0.3 < (shown != shown[0, 0]).any(-1).mean() < 0.95
    assert drawn() == picture
    assert len(np.unique(pixels(picture.light).reshape(-1, 3), axis=0)) > 300  # the frames' own pixels
    assert "“a red circle moves left”" in picture.alt


def test_masked_frames_and_words_are_not_drawn():
    mask = np.ones((3, 5), bool)
    mask[2], mask[:, 1] = False, False
    cosines = np.random.default_rng(1).uniform(0, 1, (3, 3, 5)).astype(np.float32)
    picture = drawn(mask=mask, cosines=cosines)
    assert "“a circle moves left”" in picture.alt
    cosines[:, 2], cosines[:, :, 1] = 7, -7
    assert drawn(mask=mask, cosines=cosines) == picture
    cosines[0, 0, 0] = -1
    assert drawn(mask=mask, cosines=cosines) != picture


def test_long_clips_and_captions_are_cut():
    few = drawn(frames=12)
    assert drawn(frames=64).width == few.width  # at most twelve frames, evenly spread
    long = drawn(words=[f"word{i}" for i in range(60)])
    assert "word31”" in long.alt and "word32" not in long.alt


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="nothing to draw"):
        drawn(mask=np.zeros((3, 5), bool))
