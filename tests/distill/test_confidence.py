"""The confidence gate against CLIP-TD's equations 9 and 10; CLIP's logits; anchors against all partitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.distill import ConfidenceGate, LanguageKD
from clipdistill_jax.distill.confidence import anchor_logits, answer_prompts, choice_logits, fit_anchors
from clipdistill_jax.distill.objective import WeightedTerm, distillation_loss
from clipdistill_jax.models.features import Features

B, K = 40, 4


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def logits_of(probabilities):
    return Features(logits=jnp.log(jnp.asarray(probabilities, jnp.float32)))


@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize("choices", ["all", "correct"])
def test_the_gate_is_the_equations(temperature, choices):
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, B, K)) * 2
    label = rng.integers(-1, K, B)
    teacher = Features(logits=jnp.asarray(theirs, jnp.float32), label=jnp.asarray(label))
    student = Features(logits=jnp.asarray(ours, jnp.float32))
    gate = ConfidenceGate(temperature, choices)
    expected = []
    for b in range(B):
        p_teacher, p_student = softmax(theirs[b]), softmax(ours[b])
        if choices == "all":
            ratio = temperature * p_teacher.max() / p_student.max()
        else:
            ratio = temperature * p_teacher[label[b]] / p_student[label[b]] if label[b] >= 0 else 0.0
        expected.append(ratio)
    np.testing.assert_allclose(np.exp(gate.log_ratio(student, teacher)), expected, rtol=1e-5)
    found = np.asarray(gate(student, teacher))
    np.testing.assert_array_equal(found, (np.array(expected) > 1).astype(float))
    assert 0 < found.sum() < B


def test_the_gate_by_hand():
    # CLIP is sure of a wrong choice (label 1), less sure than the student, and as sure.
    teacher = logits_of([[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.6, 0.2, 0.1, 0.1]])
    teacher = teacher.replace(label=jnp.array([1, 0, -1]))
    student = logits_of([[0.1, 0.5, 0.2, 0.2], [0.5, 0.3, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1]])
    assert ConfidenceGate()(student, teacher).tolist() == [1, 0, 0]  # r = 1.4, 0.8, 1: not above 1
    assert ConfidenceGate(choices="correct")(student, teacher).tolist() == [0, 0, 0]  # 0.2, 0.8, unknown
    assert ConfidenceGate(temperature=1.3)(student, teacher).tolist() == [1, 1, 1]
    assert ConfidenceGate(temperature=0.5)(student, teacher).tolist() == [0, 0, 0]


def test_extreme_logits_stay_finite():
    student = Features(logits=jnp.array([[1e4, -1e4], [-1e9, 0.0]], jnp.bfloat16))
    teacher = Features(logits=jnp.array([[0.0, 0.0], [3.0, 0.0]]), label=jnp.array([1, 0]))
    assert ConfidenceGate()(student, teacher).tolist() == [0, 0]
    assert ConfidenceGate(choices="correct")(student, teacher).tolist() == [1, 1]


def test_no_gradient_goes_through_the_gate():
    """The loss's gradient is that of the term where the gate is open, though its logits have parameters."""
    rng = np.random.default_rng(1)
    logits, text, theirs = (jnp.asarray(rng.normal(size=(B, K)), jnp.float32) for _ in range(3))
    teacher = Features(logits=2 * theirs, text=theirs)
    term, gate = LanguageKD(), ConfidenceGate()

    def student(params, state, batch, rng):
        return Features(logits=logits * params["sure"], text=text * params["size"]), state

    loss_fn = distillation_loss(
        lambda seen, batch: (jnp.zeros(B), jnp.ones(B, bool), {}),
        (WeightedTerm("language", term, lambda step: 0.05, gate),),
        student,
        {"clip": lambda frozen, batch: teacher},
    )

    def loss(params):
        return loss_fn({"student": params, "terms": {}}, {}, {"clip": {}}, {}, None, 0)[0]

    params = {"sure": jnp.float32(1.5), "size": jnp.float32(0.8)}
    gradient = jax.jit(jax.grad(loss))(params)
    assert float(gradient["sure"]) == 0
    seen = student(params, {}, {}, None)[0]
    is_open = np.asarray(gate(seen, teacher))
    assert 0 < is_open.sum() < B
    signs = np.sign(np.asarray(seen.text) - np.asarray(theirs)) * np.asarray(text)
    np.testing.assert_allclose(gradient["size"], 0.05 * (signs.sum(1) * is_open).mean(), rtol=1e-5)


def test_models_of_other_choices_are_refused():
    four = Features(logits=jnp.zeros((2, 4)))
    for other in (Features(logits=jnp.zeros((2, 3))), Features()):
        with pytest.raises(ValueError, match="over the same choices"):
            ConfidenceGate()(four, other)
    with pytest.raises(ValueError, match="needs labels"):
        ConfidenceGate(choices="correct")(four, four)
    with pytest.raises(ValueError, match="one of all, correct"):
        ConfidenceGate(choices="best")
    for temperature in (0.0, float("nan")):
        with pytest.raises(ValueError, match="has to be positive"):
            ConfidenceGate(temperature)


def test_choice_logits_are_scaled_cosines():
    rng = np.random.default_rng(2)
    image, own = rng.normal(size=(3, 5)), rng.normal(size=(3, K, 5))
    expected = np.zeros((3, K))
    for b, k in np.ndindex(3, K):
        expected[b, k] = 100 * image[b] @ own[b, k] / np.linalg.norm(image[b]) / np.linalg.norm(own[b, k])
    given = jnp.asarray(image, jnp.float32)
    np.testing.assert_allclose(choice_logits(given, jnp.asarray(own, jnp.float32), 100), expected, atol=1e-4)
    shared = choice_logits(given, jnp.asarray(own[0], jnp.float32), jnp.float32(100))
    repeated = jnp.broadcast_to(jnp.asarray(own[0], jnp.float32), own.shape)
    np.testing.assert_allclose(shared, choice_logits(given, repeated, 100), atol=1e-4)


def test_answers_are_put_into_the_prompt():
    assert answer_prompts(["yes", "{}", ""], "is it {}?") == ["is it yes?", "is it {}?", "is it ?"]
    for template in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match="should have one {}"):
            answer_prompts(["yes"], template)


def slow_anchors(values):
    """The best of all divisions of the sorted values into three."""
    values, found = sorted(values), []
    for first, second in itertools.combinations(range(1, len(values)), 2):
        parts = [np.array(p) for p in (values[:first], values[first:second], values[second:])]
        found.append((sum(((p - p.mean()) ** 2).sum() for p in parts), [p.mean() for p in parts]))
    return min(found)


# Whole numbers times 0.37, so that costs are equal or clearly apart.
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-20, 20), min_size=3, max_size=12), shift=st.sampled_from([0.0, 25.0]))
def test_anchors_are_the_best_of_all_divisions(values, shift):
    similarity = np.array(values) * 0.37 + shift
    if len(set(values)) < 3:
        with pytest.raises(ValueError, match="three different similarities"):
            fit_anchors(similarity)
        return
    low, high, middle = fit_anchors(similarity)
    assert low < middle < high
    cost = (np.abs(similarity[:, None] - [low, middle, high]).min(1) ** 2).sum()
    assert cost == pytest.approx(slow_anchors(similarity.tolist())[0], abs=1e-9)


def test_anchors_find_clusters_whatever_the_order():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(centre, 0.5, 300) for centre in (18, 27, 22)])
    anchors = fit_anchors(values)
    np.testing.assert_allclose(anchors, [18, 27, 22], atol=0.15)  # standard error 0.03
    np.testing.assert_allclose(fit_anchors(rng.permutation(values)), anchors, rtol=1e-12)
    with pytest.raises(ValueError, match="1 of the 901 similarities are not finite"):
        fit_anchors(np.append(values, np.nan))


def test_anchor_logits_by_hand():
    found = anchor_logits(jnp.array([20.0, 24.0]), jnp.array([19.0, 26.0, 23.0]))
    assert found.tolist() == [[-1, -36, -9], [-25, -4, -1]]
    assert found.argmax(1).tolist() == [0, 2]  # contradiction, neutral
