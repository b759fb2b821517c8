"""What is hidden: how often, where, at least one, and nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.tasks.masking import (
    at_places,
    hide_regions,
    mask_regions,
    mask_words,
    mismatch_images,
    places_of,
)

MASK, IDS = 4, (10, 30)
ROWS, LENGTH = 300, 50  # one shape for all, so that little is compiled
MASK_WORDS = jax.jit(partial(mask_words, mask_id=MASK, random_ids=IDS), static_argnames="rate")
MASK_REGIONS = jax.jit(mask_regions, static_argnames="rate")
MISMATCH = jax.jit(mismatch_images)


def words(key, tokens, maskable, rate=0.15, **options):
    """The masking of the rows at hand, amid rows and tokens that may not be chosen."""
    rows, length = tokens.shape

    def whole(x):
        x = jnp.asarray(x)
        return jnp.zeros((ROWS, LENGTH), x.dtype).at[:rows, :length].set(x)

    made = MASK_WORDS(
        jax.random.key(key),
        whole(tokens),
        whole(maskable),
        rate=rate,
        **{name: whole(x) for name, x in options.items()},
    )
    assert not np.asarray(made.chosen)[rows:].any() and not np.asarray(made.chosen)[:, length:].any()
    return np.asarray(made.tokens)[:rows, :length], np.asarray(made.chosen)[:rows, :length]


def near(found, share, count):
    """Within 4.5 standard deviations of a share of so many draws."""
    assert abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / count), (found, share, count)


def test_shares_are_bert_s():
    tokens = np.full((ROWS, LENGTH), 50, np.int32)
    maskable = np.ones(tokens.shape, bool)
    hidden, chosen = words(0, tokens, maskable)
    near(chosen.mean(), 0.15, chosen.size)
    n = chosen.sum()
    near((hidden[chosen] == MASK).mean(), 0.8, n)
    near((hidden[chosen] == 50).mean(), 0.1, n)
    others = hidden[chosen & (hidden != MASK) & (hidden != 50)]
    near(len(others) / n, 0.1, n)
    assert set(others) == set(range(*IDS))  # the whole range, without its end
    np.testing.assert_array_equal(hidden[~chosen], 50)
    assert (chosen[0] != chosen[1]).any() and (chosen[:, 0] != chosen[:, 1]).any()


def test_places_that_may_not_be_chosen_are_left_alone():
    rng = np.random.default_rng(0)
    tokens = rng.integers(40, 90, (ROWS, LENGTH), dtype=np.int32)
    maskable = rng.random(tokens.shape) < 0.2
    maskable[:3] = False
    hidden, chosen = words(1, tokens, maskable)
    assert not (chosen & ~maskable).any()
    np.testing.assert_array_equal(hidden[~chosen], tokens[~chosen])
    assert (chosen.any(1) == maskable.any(1)).all()


def test_the_same_key_gives_the_same_and_arguments_stay():
    tokens = np.full((8, 30), 50, np.int32)
    before = tokens.copy()
    first, again, other = (words(key, tokens, tokens > 0)[0] for key in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(tokens, before)


def test_a_text_without_a_choice_gets_its_first_word_masked():
    tokens = np.arange(40, 52, dtype=np.int32).reshape(2, 6)
    maskable = np.array([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]], bool)
    hidden, chosen = words(0, tokens, maskable, rate=0.0)
    np.testing.assert_array_equal(chosen, [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(hidden[chosen], MASK)
    np.testing.assert_array_equal(hidden[~chosen], tokens[~chosen])


def test_every_segment_has_one():
    tokens = np.tile(np.arange(40, 48, dtype=np.int32), (ROWS, 1))
    maskable = np.tile(np.array([0, 1, 1, 0, 1, 1, 1, 0], bool), (ROWS, 1))
    segments = np.tile(np.array([0, 0, 0, 0, 2, 2, 3, 3]), (ROWS, 1))
    hidden, chosen = words(0, tokens, maskable, segments=segments)
    assert not (chosen & ~maskable).any()
    for start, end in ((1, 3), (4, 6), (6, 7)):
        assert chosen[:, start:end].any(1).all()
    # Its first word, unless another was drawn: 1 - 0.85 * 0.15.
    near(chosen[:, 1].mean(), 1 - 0.85 * 0.15, ROWS)
    near(chosen[:, 2].mean(), 0.15, ROWS)
    # Of the forced ones all are [MASK], of the drawn ones 80%.
    assert (hidden[chosen[:, 6], 6] == MASK).mean() > 0.9


def test_whole_words_share_their_fate():
    # Two segments that both count their words from 0; word 1 of each has three tokens.
    word_ids = np.array([[-1, 0, 1, 1, 1, 2, -1, 0, 1, 1, 1, -1]] * ROWS)
    segments = np.array([[0] * 7 + [1] * 5] * ROWS)
    tokens = np.full(word_ids.shape, 50, np.int32)
    options = {"segments": segments, "word_ids": word_ids}
    hidden, chosen = words(0, tokens, word_ids >= 0, **options)
    for start in (2, 8):
        assert set(chosen[:, start : start + 3].sum(1)) == {0, 3}
        assert set((hidden[:, start : start + 3] == MASK).sum(1)) == {0, 3}
        near(chosen[:, start].mean(), 0.15, ROWS)
    assert (chosen[:, 2] != chosen[:, 8]).any() and (chosen[:, 1] != chosen[:, 7]).any()
    _, forced = words(0, tokens, word_ids > 0, rate=0.0, **options)
    np.testing.assert_array_equal(forced, [[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]] * ROWS)


def test_regions_are_hidden_at_their_rate_and_at_least_one():
    maskable = np.ones((2000, 36), bool)
    maskable[:, 30:] = False
    maskable[5] = False
    chosen = np.asarray(MASK_REGIONS(jax.random.key(0), jnp.asarray(maskable)))
    assert not (chosen & ~maskable).any()
    assert (chosen.any(1) == maskable.any(1)).all()
    near(chosen[:, :30].mean(), 0.15, 30 * 2000)  # one more in a row of a hundred: far within
    alone = np.asarray(MASK_REGIONS(jax.random.key(1), jnp.asarray(maskable[6:]), rate=0.0))
    assert (alone.sum(1) == 1).all()
    near(alone[:, 0].mean(), 1 / 30, len(alone))
    near(alone[:, 29].mean(), 1 / 30, len(alone))


def test_hidden_regions_are_zeros():
    features = jnp.arange(1.0, 13.0).reshape(1, 3, 4)
    hidden = hide_regions(features, jnp.array([[False, True, False]]))
    np.testing.assert_array_equal(hidden[0, 1], 0.0)
    np.testing.assert_array_equal(hidden[0, ::2], features[0, ::2])


def test_mismatched_examples_get_another_image_of_the_batch_drawn_evenly():
    rng, rows = np.random.default_rng(0), np.arange(2000)
    image_ids, valid = rng.integers(0, 100, 2000), rng.random(2000) < 0.8
    source, matched = map(np.asarray, MISMATCH(jax.random.key(0), jnp.asarray(image_ids), jnp.asarray(valid)))
    np.testing.assert_array_equal(matched, image_ids[source] == image_ids)
    np.testing.assert_array_equal(source[matched], np.flatnonzero(matched))
    assert matched[~valid].all() and valid[source[~matched]].all()
    near((~matched)[valid].mean(), 0.5, valid.sum())
    swapped, count = ~matched, (~matched).sum()
    near((source[swapped] < 500).mean(), 0.25, count)
    near(((source - rows)[swapped] % 2000 < 500).mean(), 0.25, count)


def test_without_another_image_an_example_keeps_its_own():
    valid = jnp.array([True, True, False])
    source, matched = mismatch_images(jax.random.key(0), jnp.array([7, 7, 8]), valid, rate=1.0)
    np.testing.assert_array_equal(source, [0, 1, 2])
    assert matched.all()


@pytest.mark.parametrize("most", [0, 2, 3, 5, 9])
def test_places_are_the_first_chosen(most):
    chosen = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)
    x = np.arange(15).reshape(3, 5) * 10
    places, kept = map(np.asarray, places_of(jnp.asarray(chosen), most))
    width = 5 if most in (0, 5, 9) else most
    assert places.shape == kept.shape == (3, width)
    vectors = np.asarray(at_places(jnp.asarray(np.stack([x, -x], -1)), jnp.asarray(places)))
    numbers = np.asarray(at_places(jnp.asarray(x), jnp.asarray(places)))
    np.testing.assert_array_equal(vectors, np.stack([numbers, -numbers], -1))
    for b in range(3):
        np.testing.assert_array_equal(numbers[b][kept[b]], x[b][chosen[b]][:width])
