"""The terms of targeted distillation against slow NumPy from CLIP-TD's equations, and by hand."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipdistill_jax.distill import TERMS, LanguageKD, TokenKD, VisionKD
from clipdistill_jax.distill.clip_td import over_choices, vector_distance
from clipdistill_jax.distill.objective import WeightedTerm, distillation_loss
from clipdistill_jax.distill.tokens import choose_words, shares, visual_relevance, word_scores
from clipdistill_jax.models.features import Features

B, K, W, D = 4, 3, 6, 5
VALID = jnp.ones(B, bool)


def features(seed, width=D, slots=W, choices=(K,), image_choices=()):
    """A model's view of B images with K texts each; the first text has all words, the last a single one."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    lengths = rng.integers(1, slots + 1, (B, *choices))
    lengths.flat[0], lengths.flat[-1] = slots, 1
    mask = np.arange(slots) < lengths[..., None]
    importance = rng.random(mask.shape) * mask * (rng.random(mask.shape) < 0.7)
    return Features(
        image=normal(B, *image_choices, width),
        text=normal(B, *choices, width),
        words=normal(B, *choices, slots, width),
        word_mask=jnp.asarray(mask),
        importance=jnp.asarray(importance, jnp.float32),
        label=jnp.asarray([2, 0, -1, 1]),
    )


@cache
def compiled(term):
    return jax.jit(lambda *args: term.apply(*args))


def value(term, student, teacher, params=None):
    """[B], compiled at once, which is quicker here than op by op."""
    return compiled(term)(params or {}, student, teacher, np.ones(len(student.word_mask), bool))


def slow_scores(image, words, importance, real):
    """Eq. 5 for one text: S of the places in `real`."""
    cosines = [image @ words[i] / np.linalg.norm(image) / np.linalg.norm(words[i]) for i in real]
    relevance = np.maximum(cosines, 0)
    matter = importance[real]
    return sum(x / x.sum() if x.sum() > 0 else 0 * x for x in (relevance, matter))


def slow_choice(scores, real, count):
    """Eq. 6 for one text: the best places; of equal ones the first."""
    return [real[i] for i in sorted(range(len(real)), key=lambda i: (-scores[i], i))[:count]]


def slow_tokens(student, teacher, count, content_only=False):
    """Eq. 7 for every text of every example, [B, K]."""
    s, t = (np.asarray(x.words, np.float64) for x in (student, teacher))
    image, importance = np.asarray(teacher.image, np.float64), np.asarray(teacher.importance, np.float64)
    masks = np.asarray(student.word_mask), np.asarray(teacher.word_mask)
    out = np.zeros((B, K))
    for b, k in np.ndindex(B, K):
        slots = range(min(s.shape[2], t.shape[2]))
        real = [w for w in slots if masks[0][b, k, w] and masks[1][b, k, w]]
        if content_only:
            real = [w for w in real if importance[b, k, w] > 0]
        if real:
            scores = slow_scores(image[b], t[b, k], importance[b, k], real)
            for w in slow_choice(scores, real, count):
                out[b, k] += np.abs(s[b, k, w] - t[b, k, w]).sum()
    return out


@pytest.mark.parametrize("count,content_only", [(2, False), (3, True), (50, False)])
def test_tokens_are_the_chosen_words_l1(count, content_only):
    # The models cut texts at different words, and the student has fewer slots.
    student, teacher = features(0, slots=W - 1), features(1)
    values = value(TokenKD(count=count, content_only=content_only), student, teacher)
    expected = slow_tokens(student, teacher, count, content_only)
    assert (expected > 0).any()
    np.testing.assert_allclose(values, expected.mean(1), rtol=1e-5)  # float32


def test_tokens_without_choices_are_those_of_one_choice():
    student, teacher = features(0, choices=(1,)), features(1, choices=(1,))

    def flat(x):
        squeezed = {name: getattr(x, name)[:, 0] for name in ("text", "words", "word_mask", "importance")}
        return x.replace(**squeezed)

    for term in (TokenKD(), LanguageKD()):
        np.testing.assert_array_equal(
            value(term, flat(student), flat(teacher)), value(term, student, teacher)
        )


choose = jax.jit(choose_words, static_argnums=2)


def test_selection_by_hand():
    # cos = .8, .6, 0, -1: shares 4/7, 3/7, 0, 0. Importance 0, 1, 3, 0: shares 0, 1/4, 3/4, 0.
    image = jnp.array([[1.0, 0.0]])
    words = jnp.array([[[0.8, 0.6], [0.6, 0.8], [0.0, 2.0], [-3.0, 0.0]]])
    mask, importance = jnp.ones((1, 4), bool), jnp.array([[0.0, 1.0, 3.0, 0.0]])
    relevance = jax.jit(visual_relevance)(image, words, mask)
    np.testing.assert_allclose(relevance, [[0.8, 0.6, 0, 0]], atol=1e-6)
    scores = jax.jit(word_scores)(relevance, importance, mask)
    np.testing.assert_allclose(scores, [[4 / 7, 3 / 7 + 1 / 4, 3 / 4, 0]], rtol=1e-5)
    places, chosen = choose(scores, mask, 2)
    assert places.tolist() == [[2, 1]] and chosen.all()
    # The student's vectors are 0, so eq. 7 is |(0, 2)|_1 + |(.6, .8)|_1.
    teacher = Features(image=image, words=words, word_mask=mask, importance=importance)
    student = Features(words=jnp.zeros((1, 4, 2)), word_mask=mask)
    np.testing.assert_allclose(value(TokenKD(), student, teacher), [3.4], rtol=1e-6)


def test_ties_go_to_the_earlier_word_and_short_texts_give_all():
    mask = jnp.array([[True] * 4, [False, True, False, False], [False] * 4])
    scores = jnp.array([[0.5, 0.7, 0.7, 0.5]] * 3)
    places, chosen = choose(scores, mask, 3)
    assert places[0].tolist() == [1, 2, 0] and chosen[0].all()
    assert places[1, 0] == 1 and chosen[1].tolist() == [True, False, False]
    assert not chosen[2].any()
    assert choose(np.zeros((1, 4), np.float32), mask[:1], 2)[0].tolist() == [[0, 1]]
    assert jax.eval_shape(lambda *x: choose_words(*x, 9), scores, mask)[0].shape == (3, 4)
    with pytest.raises(ValueError, match="at least one word"):
        choose_words(scores, mask, 0)


ROW = hnp.arrays(np.float32, W, elements=st.floats(0, 4, width=32, allow_subnormal=False))
MASKS = hnp.arrays(bool, W)


@partial(jax.jit, static_argnums=3)
def scored(relevance, importance, mask, count):
    scores = word_scores(relevance, importance, mask)
    parts = jnp.stack([shares(relevance, mask), shares(importance, mask)])
    return parts, scores, *choose_words(scores, mask, count)


@settings(max_examples=40, deadline=None)
@given(relevance=ROW, importance=ROW, mask=MASKS, count=st.sampled_from([1, 2, W + 2]))
def test_chosen_words_are_real_and_the_best(relevance, importance, mask, count):
    found = scored(jnp.asarray(relevance), jnp.asarray(importance), jnp.asarray(mask), count)
    parts, scores, places, chosen = (np.asarray(x) for x in found)
    for part, values in zip(parts, (relevance, importance), strict=True):
        assert part.sum() == pytest.approx(float((values * mask).any()), abs=1e-5)
    assert not scores[~mask].any()
    found = places[chosen].tolist()
    assert len(set(found)) == len(found) == min(count, mask.sum()) and mask[found].all()
    left = [i for i in np.flatnonzero(mask) if i not in found]
    assert all((-scores[i], i) < (-scores[j], j) for i in found for j in left)


def test_random_selection_is_uniform_over_real_words():
    texts = 2000
    word_mask = jnp.broadcast_to(jnp.arange(W) < 4, (texts, W))
    # |s - t|_1 of word w is 10^w, so that the sum tells which words were drawn.
    student = Features(words=jnp.zeros((texts, W, 1)), word_mask=word_mask)
    teacher = student.replace(words=student.words + 10.0 ** jnp.arange(W)[:, None])
    term, valid = TokenKD(selection="random"), jnp.ones(texts, bool)
    draw = jax.jit(lambda key: term.apply({}, student, teacher, valid, rngs={"mask": key}))
    sums = np.asarray(draw(jax.random.key(0)))
    drawn = sums.astype(int)[:, None] // 10 ** np.arange(W) % 10
    assert (drawn.sum(1) == 2).all() and drawn.max() == 1 and not drawn[:, 4:].any()
    # Each of 4 words in half of the texts, each of 6 pairs in a sixth; within 5 standard deviations.
    np.testing.assert_allclose(drawn[:, :4].sum(0), texts / 2, atol=5 * np.sqrt(texts / 4))
    counts = np.unique(sums, return_counts=True)[1]
    assert len(counts) == 6
    np.testing.assert_allclose(counts, texts / 6, atol=5 * np.sqrt(texts * 5 / 36))
    np.testing.assert_array_equal(draw(jax.random.key(0)), sums)
    assert not np.array_equal(draw(jax.random.key(1)), sums)


@pytest.mark.parametrize("image_choices", [(), (K,)])
def test_vision_is_l1_of_image_vectors(image_choices):
    student, teacher = features(0, image_choices=image_choices), features(1)
    s, t = np.asarray(student.image, np.float64), np.asarray(teacher.image, np.float64)
    if image_choices:
        expected = np.mean([np.abs(s[:, k] - t).sum(-1) for k in range(K)], 0)
    else:
        expected = np.abs(s - t).sum(-1)
    np.testing.assert_allclose(value(VisionKD(), student, teacher), expected, rtol=1e-5)


def test_language_is_l1_of_text_vectors():
    student, teacher = features(0), features(1)
    s, t = np.asarray(student.text, np.float64), np.asarray(teacher.text, np.float64)
    each = np.array(
        [[sum(abs(s[b, k, d] - t[b, k, d]) for d in range(D)) for k in range(K)] for b in range(B)]
    )
    np.testing.assert_allclose(value(LanguageKD(), student, teacher), each.mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", ["vision", "language", "tokens"])
def test_only_the_right_choice_is_distilled(name):
    student, teacher = features(0, image_choices=(K,)), features(1)
    values = value(TERMS[name](choices="correct"), student, teacher)
    for b, label in enumerate([2, 0, -1, 1]):
        if label < 0:
            assert values[b] == 0
            continue
        one = {n: getattr(student, n)[:, label] for n in ("image", "text", "words", "word_mask")}
        fields = {n: getattr(teacher, n)[:, label] for n in ("text", "words", "word_mask", "importance")}
        alone = value(TERMS[name](), student.replace(**one), teacher.replace(**fields))
        np.testing.assert_allclose(values[b], alone[b], rtol=1e-6)


def test_distances():
    s, t = np.random.default_rng(0).normal(size=(2, 3, D))
    expected = {
        "l1": np.abs(s - t).sum(-1),
        "l1_mean": np.abs(s - t).mean(-1),
        "mse": ((s - t) ** 2).mean(-1),
        "cosine": [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)],
    }
    for distance, values in expected.items():
        found = jax.jit(vector_distance, static_argnums=2)(
            s.astype(np.float32), t.astype(np.float32), distance
        )
        np.testing.assert_allclose(found, values, rtol=1e-5)


@pytest.mark.parametrize("name,field", [("vision", "image"), ("language", "text"), ("tokens", "words")])
def test_another_width_is_projected_by_the_term(name, field):
    student, teacher, term = features(0, width=3), features(1), TERMS[name]()
    shapes = jax.eval_shape(term.init, jax.random.key(0), student, teacher, VALID)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    kernel, bias = (params["params"]["projection"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (3, D)
    projected = student.replace(**{field: jnp.asarray(np.asarray(getattr(student, field)) @ kernel + bias)})
    np.testing.assert_allclose(
        value(term, student, teacher, params),
        value(term, projected, teacher),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["vision", "language", "tokens"])
def test_gradients_reach_the_student_alone_and_a_copy_has_no_loss(name):
    student, teacher = features(0), features(1)
    names = ("image", "text", "words")
    floats = [{n: getattr(x, n) for n in names} for x in (student, teacher)]

    def loss(ours, theirs):
        return value(TERMS[name](), student.replace(**ours), teacher.replace(**theirs)).sum()

    found, (ours, theirs) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*floats)
    assert float(found) > 1
    assert any(np.any(np.asarray(g)) for g in ours.values())
    assert not any(np.any(np.asarray(g)) for g in theirs.values())
    assert not np.any(value(TERMS[name](), teacher, teacher))


def test_only_the_chosen_words_get_a_gradient():
    student, teacher = features(0, choices=()), features(1, choices=())

    def loss(words):
        return value(TokenKD(count=2), student.replace(words=words), teacher).sum()

    gradient = jax.jit(jax.grad(loss))(student.words)
    moved = np.any(np.asarray(gradient), -1)
    both = np.asarray(student.word_mask & teacher.word_mask)
    np.testing.assert_array_equal(moved.sum(-1), np.minimum(both.sum(-1), 2))
    assert not moved[~both].any()


def test_terms_train_within_the_objective_and_draw_anew():
    teacher = features(1)
    terms = (WeightedTerm("tokens", TokenKD(selection="random", count=1), lambda step: 0.05),)
    loss_fn = distillation_loss(
        lambda seen, batch: (jnp.zeros(B), VALID, {}),
        terms,
        lambda params, state, batch, rng: (features(0), state),
        {"clip": lambda frozen, batch: teacher},
    )
    params = {"student": {}, "terms": {}}
    loss = jax.jit(lambda key: loss_fn(params, {}, {"clip": {}}, {}, key, 0)[0])
    losses = [float(loss(jax.random.key(s))) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2] and losses[0] > 0


def test_what_is_missing_or_wrong_is_named():
    student, teacher = features(0), features(1)

    def message(term, teacher):
        with pytest.raises(ValueError) as error:
            term.apply({}, student, teacher, VALID, rngs={"mask": jax.random.key(0)})
        return str(error.value)

    assert "needs image, importance" in message(TokenKD(), teacher.replace(image=None, importance=None))
    random = TokenKD(selection="random", content_only=True)
    assert "needs importance of" in message(random, teacher.replace(image=None, importance=None))
    short = teacher.replace(importance=teacher.importance[..., :-1])
    assert "(4, 3, 5), and the teacher's words are (4, 3, 6)" in message(TokenKD(), short)
    assert "'scores' or 'random'" in message(TokenKD(selection="best"), teacher)
    assert "'l2'; it can be one of l1" in message(LanguageKD(distance="l2"), teacher)
    assert "'right'; it can be one of all, correct" in message(LanguageKD(choices="right"), teacher)
    assert "needs the label" in message(LanguageKD(choices="correct"), teacher.replace(label=None))
    np.testing.assert_array_equal(over_choices(jnp.arange(3.0), None, "correct"), [0, 1, 2])
