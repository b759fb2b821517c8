"""Optimal transport against an exact solver, against slow NumPy, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from clipdistill_jax.tasks import transport

B, T, R, D = 6, 5, 7, 4
STEPS = ("beta", "iterations", "inner")
cosine_cost = jax.jit(transport.cosine_cost)
transport_plan = jax.jit(transport.transport_plan, static_argnames=STEPS)
transport_distance = jax.jit(transport.transport_distance, static_argnames=STEPS)


def states(seed=0):
    """Words, regions and their masks; sizes differ, padding stands in front too."""
    rng = np.random.default_rng(seed)
    words, regions = rng.normal(size=(B, T, D)), rng.normal(size=(B, R, D))
    word_mask, region_mask = np.ones((B, T), bool), np.ones((B, R), bool)
    word_mask[1, 3:], region_mask[1, :2] = False, False
    word_mask[2, 1:], region_mask[3, 1:] = False, False
    word_mask[4, [0, 2]] = False
    return tuple(
        map(jnp.asarray, (words.astype(np.float32), regions.astype(np.float32), word_mask, region_mask))
    )


def kept(cost, word_mask, region_mask, b):
    return np.asarray(cost, np.float64)[b][np.asarray(word_mask[b])][:, np.asarray(region_mask[b])]


def exact_distance(cost):
    """The linear program: least sum of cost * plan with rows 1/m and columns 1/n."""
    m, n = cost.shape
    rows = [np.kron(np.eye(m)[i], np.ones(n)) for i in range(m)]
    columns = [np.kron(np.ones(m), np.eye(n)[j]) for j in range(n)]
    shares = np.r_[np.full(m, 1 / m), np.full(n, 1 / n)]
    found = linprog(cost.ravel(), A_eq=np.array(rows + columns), b_eq=shares)
    assert found.success
    return found.fun


def slow_plan(cost, beta, iterations, inner):
    """Algorithm 1 of the IPOT paper with one loop a sum, in float64."""
    m, n = cost.shape
    plan, scale = np.ones((m, n)), np.full(m, 1 / m)
    for _ in range(iterations):
        q = np.exp(-cost / beta) * plan
        for _ in range(inner):
            other = np.array([1 / (n * sum(q[i, j] * scale[i] for i in range(m))) for j in range(n)])
            scale = np.array([1 / (m * sum(q[i, j] * other[j] for j in range(n))) for i in range(m)])
        plan = scale[:, None] * q * other[None, :]
    return plan


@pytest.mark.parametrize("iterations,tolerance", [(50, 0.01), (1000, 0.001)])
def test_the_distance_is_the_exact_one_within_a_tolerance(iterations, tolerance):
    # Costs span about 1.5. IPOT's error falls with the number of its steps.
    for seed in range(3):
        words, regions, word_mask, region_mask = states(seed)
        cost = cosine_cost(words, regions, word_mask, region_mask)
        found = transport_distance(words, regions, word_mask, region_mask, iterations=iterations)
        exact = [exact_distance(kept(cost, word_mask, region_mask, b)) for b in range(B)]
        np.testing.assert_allclose(found, exact, atol=tolerance)


@pytest.mark.parametrize("beta,iterations,inner", [(0.5, 50, 1), (1.0, 10, 3)])
def test_the_plan_is_the_algorithm_s(beta, iterations, inner):
    words, regions, word_mask, region_mask = states()
    cost = cosine_cost(words, regions, word_mask, region_mask)
    plan = transport_plan(cost, word_mask, region_mask, beta=beta, iterations=iterations, inner=inner)
    for b in range(B):
        slow = slow_plan(kept(cost, word_mask, region_mask, b), beta, iterations, inner)
        np.testing.assert_allclose(kept(plan, word_mask, region_mask, b), slow, rtol=1e-4, atol=1e-7)
    outside = ~(word_mask[:, :, None] & region_mask[:, None, :])
    assert not np.any(np.asarray(plan)[np.asarray(outside)])


def test_words_and_regions_keep_their_shares():
    words, regions, word_mask, region_mask = states(1)
    cost = cosine_cost(words, regions, word_mask, region_mask)
    plan = transport_plan(cost, word_mask, region_mask, iterations=200)
    shares = [np.where(m, 1 / np.asarray(m).sum(-1, keepdims=True), 0) for m in (word_mask, region_mask)]
    np.testing.assert_allclose(plan.sum(2), shares[0], rtol=1e-5)  # the last scaling is that of the words
    np.testing.assert_allclose(plan.sum(1), shares[1], atol=2e-3)


def test_the_same_vectors_in_another_order_cost_nothing():
    words = jnp.eye(4)[None]
    regions = words[:, jnp.array([2, 0, 3, 1])]
    mask = jnp.ones((1, 4), bool)
    np.testing.assert_allclose(transport_distance(words, regions, mask, mask), 0.0, atol=1e-6)
    plan = transport_plan(cosine_cost(words, regions, mask, mask), mask, mask)
    np.testing.assert_allclose(plan[0], np.eye(4)[:, [2, 0, 3, 1]] / 4, atol=1e-6)


def test_a_word_is_moved_to_all_regions_by_hand():
    words, regions = jnp.array([[[1.0, 0.0]]]), jnp.array([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    mask = jnp.ones((1, 1), bool), jnp.ones((1, 3), bool)
    np.testing.assert_allclose(cosine_cost(words, regions, *mask), [[[0.0, 1.0, 2.0]]], atol=1e-6)
    np.testing.assert_allclose(transport_distance(words, regions, *mask), 1.0, rtol=1e-5)


def test_the_gradient_goes_through_the_cost_alone():
    words, regions, word_mask, region_mask = states()
    plan = transport_plan(cosine_cost(words, regions, word_mask, region_mask), word_mask, region_mask)
    found = jax.grad(lambda w: transport_distance(w, regions, word_mask, region_mask).sum())(words)
    fixed = jax.grad(lambda w: jnp.sum(cosine_cost(w, regions, word_mask, region_mask) * plan))(words)
    np.testing.assert_allclose(found, fixed, rtol=1e-5, atol=1e-7)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize("words_left,regions_left", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_move_costs_nothing_and_has_no_gradient(words_left, regions_left):
    words, regions = jnp.zeros((2, 3, 4)), jnp.zeros((2, 5, 4))  # zeros: no direction either
    masks = jnp.arange(3) < jnp.full((2, 1), words_left), jnp.arange(5) < jnp.full((2, 1), regions_left)
    np.testing.assert_array_equal(transport_distance(words, regions, *masks), 0.0)
    for gradient in jax.grad(lambda w, r: transport_distance(w, r, *masks).sum(), (0, 1))(words, regions):
        np.testing.assert_array_equal(gradient, 0.0)


def test_states_of_length_zero_have_cost_one_and_a_finite_gradient():
    mask = jnp.ones((1, 3), bool)
    found, gradient = jax.value_and_grad(
        lambda w: transport_distance(w, jnp.ones((1, 3, 4)), mask, mask).sum()
    )(jnp.zeros((1, 3, 4)))
    np.testing.assert_allclose(found, 1.0, rtol=1e-5)
    assert np.isfinite(gradient).all()
