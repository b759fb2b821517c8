"""Distillation terms against slow NumPy written from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill import TERMS, GlobalAlignment, SpatialKD, TemporalKD
from clipdistill_jax.distill.objective import WeightedTerm, check_terms, distillation_loss, init_terms
from clipdistill_jax.models.features import Features
from clipdistill_jax.tasks.retrieval import contrastive_loss

B, F, D = 5, 4, 6


def features(seed, width=D, frames=F):
    rng = np.random.default_rng(seed)
    return Features(
        frames=jnp.asarray(rng.normal(size=(B, frames, width)), jnp.float32),
        temporal=jnp.asarray(rng.normal(size=(B, frames, width)), jnp.float32),
        frame_mask=jnp.asarray(rng.random((B, frames)) < 0.7).at[:, 0].set(True),
        similarity=jnp.asarray(rng.normal(size=(B, B)) * 3, jnp.float32),
    )


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("term,field", [(TemporalKD(), "temporal"), (SpatialKD(), "frames")])
def test_frame_terms_are_masked_mean_squared_errors(term, field):
    student, teacher = features(0), features(1)
    values = term.apply({}, student, teacher, jnp.ones(B, bool))
    for b in range(B):
        s, t = np.asarray(getattr(student, field)[b]), np.asarray(getattr(teacher, field)[b])
        both = [f for f in range(F) if student.frame_mask[b, f] and teacher.frame_mask[b, f]]
        expected = np.mean([np.mean((s[f] - t[f]) ** 2) for f in both]) if both else 0.0
        np.testing.assert_allclose(values[b], expected, rtol=1e-5)


def test_cosine_distance():
    student, teacher = features(0), features(1)
    values = SpatialKD(distance="cosine").apply({}, student, teacher, jnp.ones(B, bool))
    for b in range(B):
        cosines = []
        for f in range(F):
            if student.frame_mask[b, f] and teacher.frame_mask[b, f]:
                s, t = np.asarray(student.frames[b, f]), np.asarray(teacher.frames[b, f])
                cosines.append(s @ t / np.linalg.norm(s) / np.linalg.norm(t))
        np.testing.assert_allclose(values[b], 1 - np.mean(cosines) if cosines else 0.0, rtol=1e-5)


def test_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="'mse' or 'cosine'"):
        SpatialKD(distance="l1").apply({}, features(0), features(1), jnp.ones(B, bool))


def test_another_width_is_projected_by_the_term():
    student, teacher = features(0, width=3), features(1)
    term = TemporalKD()
    params = term.init(jax.random.key(0), student, teacher, jnp.ones(B, bool))
    kernel = np.asarray(params["params"]["projection"]["kernel"])
    assert kernel.shape == (3, D)
    projected = student.replace(temporal=jnp.asarray(np.asarray(student.temporal) @ kernel))
    np.testing.assert_allclose(
        term.apply(params, student, teacher, jnp.ones(B, bool)),
        TemporalKD().apply({}, projected, teacher, jnp.ones(B, bool)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_global_alignment_is_kl_of_rows_both_ways(temperature):
    student, teacher = features(0), features(1)
    valid = np.array([True, True, False, True, True])
    values = GlobalAlignment(temperature).apply({}, student, teacher, jnp.asarray(valid))
    s, t = np.asarray(student.similarity, np.float64), np.asarray(teacher.similarity, np.float64)
    for b in range(B):
        expected = 0.0
        if valid[b]:
            for ours, theirs in ((s[b], t[b]), (s[:, b], t[:, b])):
                p, q = softmax(theirs[valid] / temperature), softmax(ours[valid] / temperature)
                expected += temperature**2 * np.sum(p * np.log(p / q))
        np.testing.assert_allclose(values[b], expected, rtol=1e-4, atol=1e-6)


def test_global_alignment_by_hand():
    # Teacher rows (ln 3, 0) -> (3/4, 1/4), student uniform: KL = 3/4 ln(3/2) + 1/4 ln(1/2). Columns: even.
    teacher = features(1).replace(similarity=jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]])))
    student = features(0).replace(similarity=jnp.zeros((2, 2)))
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    values = GlobalAlignment().apply({}, student, teacher, jnp.ones(2, bool))
    np.testing.assert_allclose(values, [expected, expected], rtol=1e-5)


@pytest.mark.parametrize("name", ["temporal", "spatial", "global"])
def test_no_gradient_reaches_the_teacher(name):
    student = features(0)

    teacher = features(1)
    floats = {field: getattr(teacher, field) for field in ("frames", "temporal", "similarity")}

    def loss(floats):
        return TERMS[name]().apply({}, student, teacher.replace(**floats), jnp.ones(B, bool)).sum()

    assert float(loss(floats)) > 0
    for gradient in jax.grad(loss)(floats).values():
        assert not np.any(np.asarray(gradient))


@pytest.mark.parametrize("name", ["temporal", "spatial", "global"])
def test_a_copy_of_the_teacher_has_no_loss_and_others_have(name):
    same, other = features(0), features(1)
    valid = jnp.ones(B, bool)
    np.testing.assert_allclose(TERMS[name]().apply({}, same, same, valid), 0.0, atol=1e-6)
    assert float(TERMS[name]().apply({}, same, other, valid).sum()) > 0.1


def make_loss(weight, gate=None):
    def student(params, state, batch, rng):
        return batch["student"].replace(similarity=batch["student"].similarity * params["scale"]), state

    def task(seen, batch):
        valid = batch["mask"]
        return contrastive_loss(seen.similarity, valid), valid, {}

    terms = (WeightedTerm("spatial", SpatialKD(), lambda step: weight * step, gate),)
    return distillation_loss(task, terms, student, {"teacher": lambda frozen, batch: frozen})


def test_the_sum_is_the_task_and_the_weighted_gated_terms():
    mask = np.array([True, True, True, False, True])
    batch = {"student": features(0), "mask": jnp.asarray(mask)}
    teacher = features(1)
    gate = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    loss_fn = make_loss(0.5, lambda s, t: jnp.asarray(gate, jnp.float32))
    params = {"student": {"scale": jnp.float32(1.0)}, "terms": {}}
    loss, (metrics, _) = loss_fn(params, {}, {"teacher": teacher}, batch, None, 3)
    task = np.asarray(contrastive_loss(batch["student"].similarity, jnp.asarray(mask)))
    term = np.asarray(SpatialKD().apply({}, batch["student"], teacher, jnp.ones(B, bool)))
    expected = task[mask].mean() + 0.5 * 3 * (term * gate)[mask].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["spatial_loss"][0], (term * gate)[mask].sum(), rtol=1e-5)
    assert float(metrics["spatial_loss"][1]) == 4


def test_terms_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match="spatial need teacher: none is given"):
        distillation_loss(
            lambda *a: a, (WeightedTerm("spatial", SpatialKD(), lambda s: 1.0),), lambda *a: a, {}
        )


def test_a_field_that_a_model_lacks_is_named():
    terms = (WeightedTerm("temporal", TemporalKD(), lambda step: 1.0),)
    with pytest.raises(ValueError, match="'temporal' needs temporal of the teacher"):
        check_terms(terms, features(0), {"teacher": features(1).replace(temporal=None)})
    with pytest.raises(ValueError, match="compares with `teacher`, and the stage names none"):
        check_terms(terms, features(0), {"clip": features(1)})


def test_init_terms_makes_projections_only_where_widths_differ():
    terms = tuple(WeightedTerm(n, TERMS[n](), lambda step: 1.0) for n in ("temporal", "spatial", "global"))
    student = features(0).replace(frames=features(0, width=3).frames)
    made = init_terms(terms, jax.random.key(0), student, {"teacher": features(1)})
    assert set(made) == {"spatial"}
