"""Losses and outcomes of VCR, SNLI-VE and VQA against slow NumPy, by hand, and where a label is unknown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.features import Features
from clipdistill_jax.tasks.choices import (
    answer_task,
    by_category,
    choice_loss,
    choice_scores,
    choice_task,
    entailment_task,
    label_loss,
    object_loss,
)

B, K, V = 5, 4, 7
LABEL = np.array([0, 3, -1, 1, 2])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * 3


def f32(x):
    return jnp.asarray(x, jnp.float32)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def slow_choice_loss(logits, label, kind):
    out = np.zeros(len(logits))
    for b in range(len(logits)):
        for k in range(logits.shape[1]):
            right = k == label[b]
            if kind == "pairs":
                wrong_right = logits[b, k]
                out[b] -= (wrong_right[int(right)] - np.log(np.exp(wrong_right).sum())) / K
            elif kind == "sigmoid":
                out[b] -= log_sigmoid(logits[b, k] if right else -logits[b, k]) / K
            elif right:
                out[b] -= logits[b, k] - np.log(np.exp(logits[b]).sum())
        if label[b] < 0:
            out[b] = 0.0
    return out


@pytest.mark.parametrize("kind", ["pairs", "sigmoid", "softmax"])
def test_choice_losses(kind):
    logits = normal(B, K, 2) if kind == "pairs" else normal(B, K)
    found = choice_loss(f32(logits), jnp.asarray(LABEL), kind)
    np.testing.assert_allclose(found, slow_choice_loss(logits, LABEL, kind), rtol=1e-5)


@pytest.mark.parametrize("kind,shape", [("pairs", (B, K)), ("pairs", (B, K, 3)), ("softmax", (B, K, 2))])
def test_logits_of_another_loss_are_refused(kind, shape):
    with pytest.raises(ValueError, match=f"the choice loss '{kind}' takes logits"):
        choice_loss(jnp.zeros(shape), jnp.zeros(B, int), kind)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="the choice loss is 'hinge'; it can be pairs, sigmoid, softmax"):
        choice_loss(jnp.zeros((B, K)), jnp.zeros(B, int), "hinge")
    with pytest.raises(ValueError, match="the ranking is 'prob'"):
        choice_scores(jnp.zeros((B, K)), "prob")
    with pytest.raises(ValueError, match="the label loss is 'pairs'"):
        label_loss(jnp.zeros((B, K)), jnp.zeros((B, K)), "pairs")


def test_ranking_by_the_logit_of_right_or_by_the_odds():
    logits = np.array([[[0.0, 1.0], [-5.0, 0.5]]], np.float32)
    assert choice_scores(logits).argmax() == 0
    assert choice_scores(logits, "log_odds").argmax() == 1
    np.testing.assert_array_equal(choice_scores(logits[..., 1]), logits[..., 1])


def test_sure_logits_have_finite_losses_and_gradients():
    sure = jnp.full((1, K), 1e4).at[0, 1].set(-1e4)
    for kind, logits in (("pairs", jnp.stack([-sure, sure], -1)), ("sigmoid", sure), ("softmax", sure)):
        loss = jax.jit(jax.value_and_grad(lambda x, kind=kind: choice_loss(x, jnp.array([1]), kind).sum()))
        found, gradient = loss(logits)
        assert np.isfinite(found) and np.isfinite(gradient).all()


def test_label_loss_is_the_mean_binary_loss_times_the_answers():
    logits = normal(B, V)
    targets = np.random.default_rng(1).choice([0, 0.3, 0.6, 0.9, 1], (B, V))
    binary = -(targets * log_sigmoid(logits) + (1 - targets) * log_sigmoid(-logits))
    found = label_loss(f32(logits), f32(targets), "sigmoid")
    np.testing.assert_allclose(found, binary.mean(1) * V, rtol=1e-5)  # as UNITER writes it
    assert float(label_loss(jnp.zeros((1, 3)), jnp.eye(3)[:1], "sigmoid")[0]) == pytest.approx(3 * np.log(2))


def test_label_loss_with_softmax_is_cross_entropy():
    logits = normal(B, 3)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = label_loss(f32(logits), jnp.eye(3)[jnp.array([0, 1, 2, 1, 0])], "softmax")
    np.testing.assert_allclose(found, -log_p[np.arange(B), [0, 1, 2, 1, 0]], rtol=1e-5)


def test_vcr_counts_only_known_labels():
    logits = normal(B, K, 2)
    batch = {"label": jnp.asarray(LABEL), "mask": jnp.array([1, 1, 1, 1, 0], bool)}
    loss, valid, metrics = choice_task("pairs")(Features(logits=f32(logits)), batch)
    np.testing.assert_array_equal(valid, [1, 1, 0, 1, 0])
    np.testing.assert_allclose(loss, slow_choice_loss(logits, LABEL, "pairs"), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], logits[..., 1].argmax(1) == LABEL)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_entailment(kind):
    logits, label = normal(B, 3), np.array([2, 0, -1, 1, 1])
    batch = {"label": jnp.asarray(label), "mask": jnp.array([1, 0, 1, 1, 1], bool)}
    loss, valid, metrics = entailment_task(kind)(Features(logits=f32(logits)), batch)
    np.testing.assert_array_equal(valid, [1, 0, 0, 1, 1])
    for b in np.flatnonzero(valid):
        onehot = np.eye(3)[label[b]]
        if kind == "sigmoid":
            slow = -(onehot * log_sigmoid(logits[b]) + (1 - onehot) * log_sigmoid(-logits[b])).sum()
        else:
            slow = np.log(np.exp(logits[b]).sum()) - logits[b, label[b]]
        np.testing.assert_allclose(loss[b], slow, rtol=1e-5)
        assert metrics["accuracy"][b] == (logits[b].argmax() == label[b])


def test_vqa_scores_the_first_answer_softly():
    logits = np.eye(V)[[1, 2, 3]]
    targets = np.zeros((3, V))
    targets[0, [1, 2]], targets[1, 2] = [0.6, 1.0], 0.3
    batch = {
        "targets": f32(targets),
        "labelled": jnp.array([True, True, True]),
        "mask": jnp.array([True, False, True]),
    }
    loss, valid, metrics = answer_task()(Features(logits=f32(logits)), batch)
    np.testing.assert_allclose(metrics["accuracy"], [0.6, 0.3, 0.0])
    np.testing.assert_array_equal(valid, batch["mask"])
    np.testing.assert_allclose(loss, label_loss(f32(logits), f32(targets), "sigmoid"))


def test_object_loss():
    logits, classes = normal(3, 4, V), np.array([[1, 2, 6, 0], [3, -1, 0, 0], [0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = [
        [-log_p[b, r, classes[b, r]] for r in range(4) if mask[b, r] and classes[b, r] >= 0] for b in range(3)
    ]
    args = f32(logits), jnp.asarray(classes), jnp.asarray(mask)
    found = object_loss(*args, "examples")
    np.testing.assert_allclose(found, [np.mean(values[0]), np.mean(values[1]), 0.0], rtol=1e-5)
    np.testing.assert_allclose(object_loss(*args)[:2].mean(), np.mean(values[0] + values[1]), rtol=1e-5)


def test_outcomes_by_category_add_up():
    rng = np.random.default_rng(0)
    outcomes, categories = rng.random(50).astype(np.float32), rng.choice(["why", "who", "where"], 50).tolist()
    found = by_category(outcomes, categories)
    for name in set(categories):
        kept = [float(o) for o, c in zip(outcomes, categories, strict=True) if c == name]
        assert found[name] == (pytest.approx(sum(kept)), len(kept))
    assert sum(count for _, count in found.values()) == 50
    halves = by_category(outcomes[:20], categories[:20]), by_category(outcomes[20:], categories[20:])
    for name, pair in found.items():
        np.testing.assert_allclose(np.sum([h.get(name, (0, 0)) for h in halves], 0), pair, rtol=1e-6)


def test_every_outcome_needs_a_category():
    with pytest.raises(ValueError, match="3 outcomes, but 1 categories"):
        by_category(np.ones(3), ["why"])
