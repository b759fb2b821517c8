"""Local alignment against slow NumPy from its definition, and across tokenizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill.local import LocalAlignment, frame_word_scores
from clipdistill_jax.models.dual_encoder import mean_by_word
from clipdistill_jax.models.features import Features

B, FRAMES, WORDS, D = 5, 3, 4, 6
# Half the time to compile, and these arrays are too small to gain from more.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def features(seed, width=D, words=WORDS, scale=10.0):
    rng = np.random.default_rng(seed)
    return Features(
        frames=jnp.asarray(rng.normal(size=(B, FRAMES, width)), jnp.float32),
        frame_mask=jnp.asarray(rng.random((B, FRAMES)) < 0.7).at[:, 0].set(True),
        words=jnp.asarray(rng.normal(size=(B, words, width)), jnp.float32),
        word_mask=jnp.asarray(rng.random((B, words)) < 0.7).at[:, 0].set(True),
        logit_scale=jnp.float32(scale),
    )


def slow_scores(frames, frame_mask, words, word_mask):
    scores = np.zeros((len(words), len(frames)))
    for t in range(len(words)):
        for v in range(len(frames)):
            real_frames = [
                np.asarray(x, np.float64) for x, m in zip(frames[v], frame_mask[v], strict=True) if m
            ]
            real_words = [np.asarray(x, np.float64) for x, m in zip(words[t], word_mask[t], strict=True) if m]
            cosines = np.array(
                [[f @ w / np.linalg.norm(f) / np.linalg.norm(w) for w in real_words] for f in real_frames]
            )
            if cosines.size:
                scores[t, v] = (cosines.max(0).mean() + cosines.max(1).mean()) / 2
    return scores


def slow_kl(teacher, student, temperature):
    def softmax(x):
        e = np.exp(x / temperature - (x / temperature).max())
        return e / e.sum()

    p, q = softmax(teacher), softmax(student)
    return temperature**2 * np.sum(p * np.log(p / q))


@functools.cache
def compiled(term):
    return jit(lambda s, t, v: term.apply({}, s, t, v))


def value(term, student, teacher, valid=None):
    return np.asarray(
        compiled(term)(student, teacher, jnp.asarray(np.ones(B, bool) if valid is None else valid))
    )


@pytest.mark.parametrize("temperature,scale", [(1.0, 0.0), (2.0, 30.0)])
def test_local_alignment_is_its_definition(temperature, scale):
    # Widths, scales and numbers of word slots differ between the models.
    student, teacher = features(0, scale=7.0), features(1, width=9, words=WORDS + 2, scale=50.0)
    valid = np.array([True, True, False, True, True])
    frame_mask = np.asarray(student.frame_mask & teacher.frame_mask)
    word_mask = np.asarray(student.word_mask & teacher.word_mask[:, :WORDS])
    s, t = (
        slow_scores(x.frames, frame_mask, x.words[:, :WORDS], word_mask) * (scale or x.logit_scale)
        for x in (student, teacher)
    )
    expected = np.zeros(B)
    for b in np.flatnonzero(valid):
        expected[b] = slow_kl(t[b, valid], s[b, valid], temperature)
        expected[b] += slow_kl(t[valid, b], s[valid, b], temperature)
    values = value(LocalAlignment(temperature=temperature, scale=scale), student, teacher, valid)
    # Logits up to 50 in float32: their rounding is 4e-6.
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_scores_by_hand():
    # Cosines of the one frame with its two words are 1 and 0: (1/2 + 1) / 2. The masked frame and word would
    # raise the mean over words. The second text has no word, the second clip no frame.
    frames = jnp.array([[[2.0, 0.0], [0.0, 3.0]]] * 2)
    frame_mask = jnp.array([[True, False], [False, False]])
    words = jnp.array([[[5.0, 0.0], [0.0, 1.0], [1.0, 0.0]]] * 2)
    word_mask = jnp.array([[True, True, False], [False, False, False]])
    scores = jit(frame_word_scores)(frames, frame_mask, words, word_mask)
    np.testing.assert_allclose(scores, [[0.75, 0.0], [0.0, 0.0]], atol=1e-6)


def test_blocks_equal_the_whole():
    x = features(0)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(B, B)), jnp.float32)

    def outcome(block):
        def loss(frames, words):
            scores = frame_word_scores(frames, x.frame_mask, words, x.word_mask, block)
            return jnp.sum(scores * weights), scores

        return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x.frames, x.words)

    whole = jax.tree.leaves(outcome(0))
    for ours, theirs in zip(jax.tree.leaves(outcome(3)), whole, strict=True):  # 3 does not divide 5
        # The same sums of six products, in another order of instructions.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_blocks_hold_fewer_cosines():
    many = jax.ShapeDtypeStruct((64, 16, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((64, 16), jnp.bool_)

    def memory(block):
        def total(frames, frame_mask, words, word_mask):
            return frame_word_scores(frames, frame_mask, words, word_mask, block).sum()

        return (
            jax.jit(jax.grad(total))
            .lower(many, mask, many, mask)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    whole = 64 * 64 * 16 * 16 * 4  # bytes of all cosines
    assert memory(0) > whole / 2 > 2 * memory(2)


def test_no_gradient_reaches_the_teacher_and_some_reaches_the_student():
    student, teacher = features(0), features(1)

    @jit
    def gradients(ours, theirs):
        def loss(ours, theirs):
            names = ("frames", "words", "logit_scale")
            models = [
                x.replace(**dict(zip(names, y, strict=True))) for x, y in ((student, ours), (teacher, theirs))
            ]
            return LocalAlignment(block=2).apply({}, *models, jnp.ones(B, bool)).sum()

        return jax.grad(loss, (0, 1))(ours, theirs)

    of_student, of_teacher = gradients(*((x.frames, x.words, x.logit_scale) for x in (student, teacher)))
    assert all(not np.any(np.asarray(x)) for x in of_teacher)
    assert all(np.any(np.asarray(x)) and np.isfinite(np.asarray(x)).all() for x in of_student)


def test_raw_clip_itself_has_no_loss():
    x = features(0)
    np.testing.assert_allclose(value(LocalAlignment(), x, x), 0.0, atol=1e-5)
    assert value(LocalAlignment(), x, features(1)).min() > 0.1


def test_padded_frames_words_and_examples_change_nothing():
    student, teacher = features(0), features(1)
    valid = np.array([True, True, False, True, True])
    before = value(LocalAlignment(), student, teacher, valid)
    frames = np.asarray(student.frame_mask & teacher.frame_mask) & valid[:, None]
    words = np.asarray(student.word_mask & teacher.word_mask) & valid[:, None]
    assert not frames[valid].all() and not words[valid].all()
    changed = [
        x.replace(
            frames=jnp.where(frames[..., None], x.frames, 1.0),
            words=jnp.where(words[..., None], x.words, 1.0),
        )
        for x in (student, teacher)
    ]
    after = value(LocalAlignment(), *changed, valid)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    assert after[2] == 0


def split(words, counts, slots, rng):
    """Token states whose means by word are `words`: word i in counts[i] tokens, all between two specials."""
    states, ids = [rng.normal(size=D)], [-1]
    for i, (word, count) in enumerate(zip(words, counts, strict=True)):
        noise = rng.normal(size=(count, D))
        states += list(word + noise - noise.mean(0))
        ids += [i] * count
    states.append(rng.normal(size=D))
    padding = slots - len(states)
    return np.array(states + [rng.normal(size=D)] * padding), np.array(ids + [-1] * (1 + padding))


def test_words_of_two_tokenizers_align():
    rng = np.random.default_rng(0)
    teacher = features(0)
    words = [rng.normal(size=(count, D)) for count in (1, 2, 3, 4, 3)]

    def said(counts, slots):
        made = [split(x, [counts[i] for i in range(len(x))], slots, rng) for x in words]
        return (
            jnp.asarray(np.stack(x), kind)
            for x, kind in zip(zip(*made, strict=True), (jnp.float32, jnp.int32), strict=True)
        )

    def model(states, ids):
        means, mask = jit(mean_by_word)(states, ids)
        return teacher.replace(words=means, word_mask=mask)

    bpe, (pieces, piece_ids) = model(*said((1, 3, 1, 2), 12)), said((2, 1, 2, 1), 9)
    # The same words, cut otherwise and padded otherwise: nothing is left to learn.
    np.testing.assert_allclose(value(LocalAlignment(), model(pieces, piece_ids), bpe), 0.0, atol=1e-4)
    # Token by token they do not align.
    by_token = jnp.where(piece_ids >= 0, jnp.arange(9) - 1, -1)
    assert value(LocalAlignment(), model(pieces, by_token), bpe).max() > 0.1
    # A word that one tokenizer cut off counts for neither.
    shorter = jnp.where(piece_ids >= 2, -1, piece_ids)
    np.testing.assert_allclose(value(LocalAlignment(), model(pieces, shorter), bpe), 0.0, atol=1e-4)
