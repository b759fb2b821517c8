"""Importance of words: by hand on keywords, YAKE's own score by its formula, alignment, storage."""

import json
import logging
import math
import string

import numpy as np
import pytest
import yake
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.importance import (
    Importance,
    read_importance,
    spread_over_words,
    word_importance,
    write_importance,
)
from clipdistill_jax.data.words import split_words

TEXTS = [
    "She is sending a telegram to the police officer.",
    "Yes.",
    "",
    "The dog's tail, isn't it? A T-shirt; 3 men & 2nd-hand cafés!",
    "ΟΔΟΣ İstanbul Straße",
]


def important(text):
    """word -> its shares, in order of place."""
    (words,), (values,) = split_words([text]), word_importance([text])
    return [word for word, value in zip(words, values, strict=True) if value > 0]


def test_shares_by_hand():
    # women: 1/.25 + half of 1/.5; embracing: 1/1 + half of 1/.5; "are" is no keyword by itself.
    keywords = [("women are embracing", 0.5), ("women", 0.25), ("embracing", 1.0)]
    words = ["two", "women", "are", "embracing", "."]
    assert spread_over_words(words, keywords) == pytest.approx([0, 5 / 7, 0, 2 / 7, 0])
    # Each place where a word stands gets its importance.
    assert spread_over_words(["dog", ",", "dog"], [("dog", 0.3)]) == pytest.approx([0.5, 0, 0.5])
    # The parts of a hyphenated word share it; n-grams pass over clitics, which YAKE drops.
    assert spread_over_words(["t", "-", "shirt"], [("t-shirt", 2.0)]) == pytest.approx([0.5, 0, 0.5])
    words = ["dog", "'s", "tail"]
    keywords = [("dog tail", 0.5), ("dog", 1.0), ("tail", 0.5)]
    assert spread_over_words(words, keywords) == pytest.approx([2 / 5, 0, 3 / 5])
    assert spread_over_words(["a", "b"], []) == [0, 0]
    assert spread_over_words(["a"], [("'s", 1.0), ("zebra", 1.0)]) == [0]


def test_yake_scores_a_word_by_its_formula():
    """Campos et al. 2020, eqs. 1 to 7, for a text of one word, and that the lower is the more important."""
    case, position, frequency, related, spread = 0, math.log(math.log(3)), 1, 1, 1
    score = related * position / (case + frequency / related + spread / related)
    score = score / (1 * (1 + score))  # eq. 7 for an n-gram of one word
    ((word, found),) = yake.KeywordExtractor(lan="en", n=3).extract_keywords("men")
    assert word == "men" and found == pytest.approx(score, rel=1e-9)


def test_stop_words_numbers_and_punctuation_get_nothing():
    assert important(TEXTS[0]) == ["sending", "telegram", "police", "officer"]
    assert important(TEXTS[1]) == important(TEXTS[2]) == important("... !?") == []
    assert important(TEXTS[3]) == ["dog", "tail", "t", "shirt", "men", "cafés"]
    # Σ has two lower cases, and that of İ is two characters, of which CLIP takes the second as a mark.
    assert important(TEXTS[4]) == ["οδοσ", "i", "stanbul", "straße"]
    assert important("Is the cat\non the\tMAT?") == ["cat", "mat"]


def test_a_word_in_better_ngrams_counts_more():
    (words,), (values,) = split_words(TEXTS[:1]), word_importance(TEXTS[:1])
    found = dict(zip(words, values, strict=True))
    # "police officer" is YAKE's best keyword but "sending a telegram"; "officer" is the better half.
    assert found["officer"] > found["police"] > found["telegram"] == found["sending"] > 0


@settings(max_examples=120, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40) | st.text(string.printable, max_size=80))
@example("rock'n'roll don’t the dog’s o'clock e-mail a.b@c.de http://x.y/z")
@example("x" * 300)
def test_every_word_has_a_share(text):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("yake").addHandler(handler)
    try:
        (values,) = word_importance([text])
    finally:
        logging.getLogger("yake").removeHandler(handler)
    assert not [r for r in records if r.levelno >= logging.WARNING]  # YAKE swallows its errors into these
    (words,) = split_words([text])
    assert values.dtype == np.float32 and values.shape == (len(words),)
    assert np.isfinite(values).all() and (values >= 0).all()
    assert float(values.sum()) == pytest.approx(float(values.any()), abs=1e-5)
    assert not any(v for w, v in zip(words, values, strict=True) if not any(c.isalnum() for c in w))


def test_processes_give_the_same_in_the_same_order(capsys):
    texts = [f"{text} {word}" for text in TEXTS for word in ("tree", "house", "tree")]
    alone = word_importance(texts)
    for values, one in zip(alone, texts, strict=True):
        np.testing.assert_array_equal(values, word_importance([one])[0])
    together = word_importance(texts, workers=2, progress=True)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "10/10" in capsys.readouterr().err  # texts that differ
    assert word_importance([], workers=2) == []


def test_words_of_real_questions(shared_data):
    pairs = (shared_data / "snli_ve_mini" / "sample_pairs.jsonl").read_text().splitlines()
    asked = json.loads((shared_data / "vqa_v2_mini" / "questions.json").read_text())["questions"]
    texts = [json.loads(line)["sentence2"] for line in pairs] + [item["question"] for item in asked]
    for text, values in zip(texts, word_importance(texts), strict=True):
        assert len(values) == len(split_words([text])[0])
        assert values.sum() == pytest.approx(1, abs=1e-5), text


def test_stored_shares_are_read_back_as_batches(tmp_path):
    scores = word_importance(TEXTS)
    path = tmp_path / "importance.npz"
    write_importance(path, TEXTS, scores)
    assert [file.name for file in tmp_path.iterdir()] == ["importance.npz"]
    stored = read_importance(path, TEXTS)
    ids = np.array([[0, 2], [4, 3], [1, 0]])
    rows = stored.rows(ids, 7)
    assert rows.shape == (3, 2, 7) and rows.dtype == np.float32
    for place in np.ndindex(3, 2):
        values = scores[ids[place]][:7]
        np.testing.assert_array_equal(rows[place], [*values, *[0] * (7 - len(values))])
    assert stored.rows(np.zeros((0, 4), np.int64), 3).shape == (0, 4, 3)
    for wrong in ([-1], [5]):
        with pytest.raises(IndexError, match="not all in 0 .. 4"):
            stored.rows(np.array(wrong), 3)
    empty = Importance(np.zeros(0, np.float32), np.zeros(2, np.int64))
    assert empty.rows(np.array([0]), 2).tolist() == [[0, 0]]


def test_other_texts_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "importance.npz"
    with pytest.raises(FileNotFoundError, match="prepare the data first"):
        read_importance(path, TEXTS)
    write_importance(path, TEXTS, word_importance(TEXTS))
    for others in (TEXTS[::-1], TEXTS[:-1], ["".join(TEXTS)]):
        with pytest.raises(ValueError, match="made for other texts"):
            read_importance(path, others)
    for damaged in (path.read_bytes()[:-40], b"", b"not a zip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="importance.npz cannot be read"):
            read_importance(path, TEXTS)
