"""Layer terms against slow NumPy from their equations, and students built to fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipdistill_jax.distill import TERMS, LayerToLayer, StudentAsBase, TeacherAsBase
from clipdistill_jax.models.features import Features
from tests.distill.layer_cases import (
    FRAMES,
    MIXED,
    STUDENT,
    TEACHER,
    B,
    dense,
    features,
    jit,
    run,
    slow_grid,
    slow_term,
    standard,
    start,
)


@pytest.mark.parametrize(
    "kind,fields,student_shapes,teacher_shapes",
    [
        ("sab", dict(form="A", mask="none"), STUDENT[:2], MIXED[1:]),
        ("sab", dict(form="B", mask="depth", normalize="none"), STUDENT[:2], MIXED),
        ("sab", dict(form="A", mask="top_k", top_k=2, scores="cosine"), STUDENT, TEACHER[:2]),
        ("tab", dict(form="A", mask="none"), STUDENT[:2], TEACHER[:2]),
        ("tab", dict(form="B", mask="depth"), STUDENT, MIXED[1:]),
        ("tab", dict(form="A", mask="top_k", top_k=1, grid=2, normalize="none"), STUDENT[:2], TEACHER[:2]),
    ],
)
def test_layer_bases_are_their_equations(kind, fields, student_shapes, teacher_shapes):
    student, teacher = features(0, student_shapes), features(1, teacher_shapes)
    term = TERMS[kind](key_dim=4, **fields)
    params = start(term, student, teacher)
    values, kept = run(term, params, student, teacher)
    expected, weights = slow_term(term, params, student, teacher, kind)
    # Sums of a few hundred float32 squares.
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    ours = np.asarray(kept["weights"])
    np.testing.assert_allclose(ours, weights, atol=1e-6)
    rows, columns = (teacher, student) if kind == "sab" else (student, teacher)
    assert ours.shape == (B, len(rows.layers), len(columns.layers))
    np.testing.assert_allclose(ours.sum(2), 1, atol=1e-6)
    if kind == "sab" and term.form == "A":  # what is shown is what is matched
        seen, shown = np.asarray(student.frame_mask & teacher.frame_mask), 0.0
        for m, target in enumerate(kept["targets"]):
            mixed = sum(ours[:, m, n, None, None, None, None] * x for n, x in enumerate(kept["bases"][m]))
            error = np.mean((np.asarray(target) - mixed) ** 2, (2, 3, 4))
            shown = shown + (error * seen).sum(1) / np.maximum(seen.sum(1), 1) / len(kept["targets"])
        np.testing.assert_allclose(shown, values, rtol=1e-5)


def test_ol2ol_is_the_mean_of_its_pairs():
    student, teacher = features(0, STUDENT), features(1, MIXED)
    term = LayerToLayer(student_layers=(0, -2), teacher_layers=(2, 0))
    params = start(term, student, teacher)
    expected = np.zeros(B)
    for n, m in ((0, 2), (1, 0)):
        for b in range(B):
            errors = []
            for f in range(FRAMES):
                if student.frame_mask[b, f] and teacher.frame_mask[b, f]:
                    target = np.apply_along_axis(
                        standard, -1, np.asarray(teacher.layers[m][b, f], np.float64)
                    )
                    ours = slow_grid(np.asarray(student.layers[n][b, f], np.float64), target.shape[0])
                    errors.append(
                        np.mean((dense(params["params"], f"project{n}_to_layer{m}", ours) - target) ** 2)
                    )
            expected[b] += np.mean(errors) / 2 if errors else 0.0
    np.testing.assert_allclose(run(term, params, student, teacher)[0], expected, rtol=2e-5)


def test_form_a_is_at_most_form_b():
    student, teacher = features(0, STUDENT[:2]), features(1, TEACHER[:2])
    terms = [StudentAsBase(form=form, mask="random_spatial", key_dim=4) for form in "AB"]
    params = start(terms[0], student, teacher)
    a, b = (run(term, params, student, teacher)[0] for term in terms)
    assert (a < b).all() and (a > 0).all()


@pytest.mark.parametrize("kind,one", [("sab", "student"), ("tab", "teacher")])
def test_one_layer_to_combine_makes_both_forms_equal(kind, one):
    student, teacher = features(0, STUDENT[:2]), features(1, TEACHER[:2])
    terms = [TERMS[kind](form=form, key_dim=4, **{f"{one}_layers": (1,)}) for form in "AB"]
    params = start(terms[0], student, teacher)
    (a, kept), (b, _) = (run(term, params, student, teacher) for term in terms)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(kept["weights"], 1.0)


def test_random_spatial_masking_drops_positions_and_favours_none():
    student, teacher = features(0, STUDENT[1:]), features(1, TEACHER[:1])
    masked = StudentAsBase(mask="random_spatial", mask_rate=0.5, key_dim=4)
    params = start(masked, student, teacher)
    whole, _ = run(StudentAsBase(mask="none", key_dim=4), params, student, teacher)
    draws = jit(
        jax.vmap(lambda k: masked.apply(params, student, teacher, jnp.ones(B, bool), rngs={"mask": k}))
    )(jax.random.split(jax.random.key(0), 400))
    draws = np.asarray(draws)
    assert np.std(draws, 0).min() > 0
    # The mean over a random set of positions has the mean over all: within five standard errors.
    error = np.std(draws, 0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, 0) - whole) < 5 * error).all()


EVERY = [
    ("sab", dict(form="A", mask="none")),
    ("sab", dict(form="B", mask="random_spatial")),
    ("tab", dict(form="A")),
    ("tab", dict(form="semckd", batch_size=8)),
    ("ol2ol", dict()),
]


@functools.cache
def differentiated(term):
    """(params, student, teacher, valid) -> values, and gradients in params and in both models' maps."""

    @jit
    def gradients(params, student, teacher, valid):
        def loss(params, ours, theirs):
            models = student.replace(layers=ours), teacher.replace(layers=theirs)
            values = term.apply(params, *models, valid, rngs={"mask": jax.random.key(0)})
            return jnp.where(valid, values, 0).sum(), values

        grads, values = jax.grad(loss, (0, 1, 2), has_aux=True)(params, student.layers, teacher.layers)
        return values, *grads

    return gradients


def small():
    """Both models with two layers; the student's in bfloat16."""
    student, teacher = features(0, STUDENT[:2]), features(1, TEACHER[:2])
    return student.replace(layers=tuple(x.astype(jnp.bfloat16) for x in student.layers)), teacher


@pytest.mark.parametrize("kind,fields", EVERY)
def test_no_gradient_reaches_the_teacher_and_some_reaches_the_student(kind, fields):
    (student, teacher), term = small(), TERMS[kind](**fields)
    params = start(term, student, teacher)
    _, of_params, of_ours, of_theirs = differentiated(term)(params, student, teacher, jnp.ones(B, bool))
    assert all(not np.any(np.asarray(x)) for x in of_theirs)
    for x in jax.tree.leaves((of_params, of_ours)):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    kernels = [x for x in jax.tree.leaves(of_params) if x.ndim > 1]
    assert all(np.any(np.asarray(x, np.float32)) for x in [*kernels, *of_ours])


@pytest.mark.parametrize("kind,fields", EVERY)
def test_padded_frames_and_examples_change_nothing(kind, fields):
    (student, teacher), term = small(), TERMS[kind](**fields)
    params = start(term, student, teacher)
    valid = np.array([True, True, False, True])
    seen = np.asarray(student.frame_mask & teacher.frame_mask)
    assert not seen[valid].all()
    before = differentiated(term)(params, student, teacher, valid)
    real = (seen & valid[:, None])[..., None, None, None]
    changed = [
        x.replace(layers=tuple(jnp.asarray(np.where(real, y, 50), y.dtype) for y in x.layers))
        for x in (student, teacher)
    ]
    after = differentiated(term)(params, *changed, valid)
    np.testing.assert_allclose(after[0][valid], before[0][valid], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(after[1]), jax.tree.leaves(before[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    # A clip without a frame has no distance.
    blind = student.replace(frame_mask=student.frame_mask.at[1].set(False))
    assert differentiated(term)(params, blind, teacher, valid)[0][1] == 0


def plant():
    """A teacher of two layers, each a mean of the student's two with other weights."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 8, 2, 2, 2, 4)).astype(np.float32)
    mask = jnp.ones((8, 2), bool)
    student = Features(layers=(jnp.asarray(first), jnp.asarray(second)), frame_mask=mask)
    layers = (jnp.asarray(0.7 * first + 0.3 * second), jnp.asarray(0.2 * first + 0.8 * second))
    return student, Features(layers=layers, frame_mask=mask)


def trained(term, steps=400):
    """The mean value after a short optimisation of the term's own parameters."""
    student, teacher = plant()
    valid = jnp.ones(8, bool)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def loss(params):
        return term.apply(params, student, teacher, valid).mean()

    @jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, steps)
        return loss(carry[0])

    return float(train(start(term, student, teacher)))


def test_a_planted_teacher_is_reached_with_the_student_as_base_only():
    fields = dict(normalize="none", mask="none", key_dim=4)
    # Every projection of one student layer misses at least 0.3 (or 0.2) of the other in any mean of the
    # teacher's layers: (0.3^2 + 0.2^2) / 2 = 0.065 stays, less what chance correlations of 64 positions give.
    assert trained(StudentAsBase(**fields)) < 1e-3
    assert trained(TeacherAsBase(**fields)) > 0.04


def test_wrong_fields_are_refused():
    student, teacher = features(0, STUDENT), features(1, MIXED)
    for term, message in (
        (StudentAsBase(form="C"), "'sab': form is 'C'"),
        (StudentAsBase(mask="rows"), "'sab': mask is 'rows'"),
        (StudentAsBase(scores="l2"), "'sab': scores is 'l2'"),
        (StudentAsBase(normalize="l2"), "'sab': normalize is 'l2'"),
        (StudentAsBase(mask="top_k", top_k=4), "top_k is 4, of 3 layers"),
        (StudentAsBase(mask_rate=1.0), "mask_rate is 1.0"),
        (StudentAsBase(teacher_layers=(-4,)), "teacher_layers has -4, but the teacher has 3"),
        (StudentAsBase(student_layers=(1, -2)), "names a layer twice"),
        (TeacherAsBase(), "several shapes cannot be summed"),
        (TeacherAsBase(mask="depth", form="semckd", batch_size=8), "takes no mask"),
        (LayerToLayer(teacher_layers=(0, 1)), "3 of the student and 2 of the teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(term.init, jax.random.key(0), student, teacher, jnp.ones(B, bool))
