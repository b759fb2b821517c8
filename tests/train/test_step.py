import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.train import metrics, optimizers, sharding, state
from clipdistill_jax.train.step import make_train_step
from tests.train.toy_run import ROWS, batch_at, host, loss_fn, make


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def test_one_step_is_the_gradient_step_written_out(mesh):
    start, step_fn, _ = make(mesh, optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.0}, seed=5)
    before = host(start)
    params, model_state = start.params, start.model_state
    rng = jax.random.fold_in(jax.random.key(0), 0)
    batch = sharding.place_batch(batch_at(0), mesh)

    def loss(params):
        return loss_fn(params, model_state, None, batch, rng, 0)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (reported, new_model_state)), grads = jax.device_get(gradient(params))
    after, found = step_fn(start, None, batch)
    expected = {name: before[f"params/{name}"] - 0.1 * g for name, g in host(grads).items()}
    for name, x in expected.items():
        np.testing.assert_allclose(host(after.params)[name], x, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(after.model_state["mean"], new_model_state["mean"], rtol=1e-5, atol=1e-7)
    assert int(after.step) == 1 and after.step.dtype == jnp.int32
    means = metrics.finalize(jax.device_get(found))
    norm = np.sqrt(sum((g**2).sum() for g in host(grads).values()))
    np.testing.assert_allclose(means["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(means["grad_norm"], norm, rtol=1e-5)
    assert means["accuracy"] == reported["accuracy"][0] / ROWS
    assert means["learning_rate"] == np.float32(0.1) and means["nonfinite"] == means["skipped"] == 0


def test_the_state_is_donated_and_the_frozen_argument_is_not(mesh):
    start, step_fn, _ = make(mesh)
    frozen = {"scale": jax.device_put(jnp.float32(2.0), sharding.replicated(mesh))}
    kernel = start.params["first"]["kernel"]
    after, _ = step_fn(start, frozen, sharding.place_batch(batch_at(0), mesh))
    assert kernel.is_deleted()
    assert not frozen["scale"].is_deleted() and float(frozen["scale"]) == 2.0
    assert not any("scale" in name for name in host(after))


def test_randomness_is_a_function_of_seed_and_step(mesh):
    sgd = {"name": "sgd", "learning_rate": 0.0}
    built = make(mesh, optimizer=sgd)[2]
    step_fns = [make_train_step(loss_fn, built, seed=seed) for seed in (0, 1)]

    def losses(seed, steps):
        now, step_fn = make(mesh, optimizer=sgd)[0], step_fns[seed]
        batch, out = sharding.place_batch(batch_at(0), mesh), []
        for _ in range(steps):
            now, found = step_fn(now, None, batch)
            out.append(float(found["loss"][0]))
        return out

    first = losses(0, 2)
    assert losses(0, 2) == first
    assert first[0] != first[1]
    assert losses(1, 1)[0] != first[0]


def test_nan_policy(mesh):
    good, bad = batch_at(0), batch_at(1)
    bad["x"][3, 2] = np.nan
    good, bad = sharding.place_batch(good, mesh), sharding.place_batch(bad, mesh)
    now, step_fn, _ = make(mesh, nan_policy="skip", ema_decay=0.5)
    now, _ = step_fn(now, None, good)
    before = host(now)
    now, skipped = step_fn(now, None, bad)
    after = host(now)
    assert before.pop("step") == 1 and after.pop("step") == 2
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    assert skipped["skipped"] == (1, 1) and skipped["nonfinite"] == (0, 1)
    assert skipped["loss"] == skipped["accuracy"] == (0, 0)  # counts towards nothing
    now, found = step_fn(now, None, good)
    assert found["skipped"] == (0, 1)
    assert np.any(host(now.params)["first/kernel"] != before["params/first/kernel"])

    now, step_fn, _ = make(mesh, nan_policy="raise")
    _, found = step_fn(now, None, bad)
    assert found["nonfinite"] == (1, 1) and found["skipped"] == (0, 1)


def test_an_infinite_gradient_of_a_finite_loss_counts_too(mesh):
    def steep(params, model_state, frozen, batch, rng, step):
        return jnp.sqrt(params["x"]), ({}, {})  # at 0

    optimizer = optimizers.make_optimizer({}, {"x": jnp.zeros(())}, 1)
    start = state.create(lambda key: ({"x": jnp.zeros(())}, {}), optimizer, mesh, jax.random.key(0))
    after, found = make_train_step(steep, optimizer, nan_policy="skip")(start, None, {})
    assert found["skipped"] == (1, 1) and after.params["x"] == 0


def test_ema_is_the_running_average(mesh):
    now, step_fn, _ = make(mesh, ema_decay=0.75)
    average = host(now.params)
    for i in range(3):
        now, _ = step_fn(now, None, sharding.place_batch(batch_at(i), mesh))
        average = {name: 0.75 * average[name] + 0.25 * x for name, x in host(now.params).items()}
    for name, x in average.items():
        np.testing.assert_allclose(host(now.ema)[name], x, rtol=1e-5, atol=1e-7)
    assert now.eval_params is now.ema


def test_a_frozen_part_costs_no_backward_pass(mesh):
    def flops(multipliers):
        start, step_fn, _ = make(mesh, optimizer={"name": "sgd", "multipliers": multipliers})
        lowered = step_fn.lower(start, None, sharding.place_batch(batch_at(0), mesh))
        return lowered.compile().cost_analysis()["flops"]

    assert flops((("first", 0.0),)) < 0.8 * flops(())


def test_misuse_is_refused(mesh):
    start, step_fn, optimizer = make(mesh)
    batch = sharding.place_batch(batch_at(0), mesh)
    with pytest.raises(ValueError, match="'ignore' is not one of raise, skip"):
        make_train_step(loss_fn, optimizer, nan_policy="ignore")
    with pytest.raises(ValueError, match="ema_decay"):
        make_train_step(loss_fn, optimizer, ema_decay=0.9)(start, None, batch)

    def reports(metrics):
        return lambda params, *_: (params["first"]["kernel"].sum(), (metrics, {"mean": jnp.zeros(32)}))

    with pytest.raises(ValueError, match=r"'mine' is not a \(sum, count\) pair"):
        make_train_step(reports({"mine": jnp.zeros(())}), optimizer)(start, None, batch)
    with pytest.raises(ValueError, match="'loss' is the step's own"):
        make_train_step(reports({"loss": metrics.scalar(1)}), optimizer)(start, None, batch)
    with pytest.raises(ValueError, match="model_state"):
        make_train_step(lambda p, *_: (p["first"]["bias"].sum(), ({}, {})), optimizer)(start, None, batch)


def test_metrics_do_not_depend_on_the_split():
    rng = np.random.default_rng(0)
    values = rng.normal(size=23).astype(np.float32)
    mask = rng.random(23) < 0.6
    values[~mask] = np.nan
    expected = values[mask].mean(dtype=np.float64)
    mean = jax.jit(metrics.mean)
    for cuts in ([], [1, 12]):
        pairs = zip(np.split(values, cuts), np.split(mask, cuts), strict=True)
        parts = [{"m": mean(v, m)} for v, m in pairs]
        assert metrics.finalize(metrics.merge(parts))["m"] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(metrics.finalize({"m": mean(np.ones(23, np.float32), np.zeros(23, bool))})["m"])
