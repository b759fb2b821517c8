"""Adversarial training against a hand-written loop with hand-derived gradients, its cost, its corners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.features import Features
from clipdistill_jax.tasks.adversarial import (
    PRESETS,
    Adversarial,
    adversarial_loss,
    move,
    symmetric_divergence,
    with_divergence,
)
from clipdistill_jax.tasks.choices import choice_task
from clipdistill_jax.train.optimizers import make_optimizer
from clipdistill_jax.train.state import TrainState
from clipdistill_jax.train.step import make_train_step

B, T, R, C, D, H, N = 4, 3, 2, 5, 6, 4, 3
SHAPES = {"words": (B, T, C), "regions": (B, R, D)}


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(C, H)), "v": rng.normal(size=(D, H)), "u": rng.normal(size=(H, N))}
    batch = {"words": rng.normal(size=SHAPES["words"]), "regions": rng.normal(size=SHAPES["regions"])}
    return params, batch, rng.integers(0, N, B)


def as_jax(params, batch, label):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch)) + (jnp.asarray(label),)


def pass_loss(settings):
    """Logits are u of the sum of tanh of projected words and regions; the loss is the mean cross-entropy."""

    def loss(params, noise, clean, key, batch, label):
        words, regions = (batch[name] + noise[name] for name in ("words", "regions"))
        hidden = jnp.tanh(words @ params["w"]).sum(1) + jnp.tanh(regions @ params["v"]).sum(1)
        logits = hidden @ params["u"]
        value = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1).mean()
        if clean is not None:
            both = symmetric_divergence(clean, logits, settings.kl_mean)
            value = value + settings.kl_weight * both.mean()
        return value, (logits, {"noise": noise, "value": value})

    return loss


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(params, batch, noise):
    words, regions = (batch[name] + noise.get(name, 0) for name in ("words", "regions"))
    a, b = np.tanh(words @ params["w"]), np.tanh(regions @ params["v"])
    hidden = a.sum(1) + b.sum(1)
    return hidden @ params["u"], (words, regions, a, b, hidden)


def backward(params, kept, dlogits):
    words, regions, a, b, hidden = kept
    dhidden = (dlogits @ params["u"].T)[:, None]
    da, db = dhidden * (1 - a**2), dhidden * (1 - b**2)
    grads = {
        "w": np.einsum("btc,bth->ch", words, da),
        "v": np.einsum("brd,brh->dh", regions, db),
        "u": hidden.T @ dlogits,
    }
    return grads, {"words": da @ params["w"].T, "regions": db @ params["v"].T}


def divergence_gradient(p, q):
    """Of KL(p||q) + KL(q||p) by the logits of q, for softmaxes p and q."""
    ratio = np.log(p / q)
    return -q * ratio + q * (q * ratio).sum(-1, keepdims=True) - (p - q)


def slow_training(settings, params, batch, label):
    """VILLA's loop: every pass adds its gradient, then moves the noise by the gradient of that same pass."""
    sizes = {k: v for k, v in (("words", settings.word_step), ("regions", settings.region_step)) if v}
    groups = [[name] for name in sizes] if settings.separate else [list(sizes)]
    noise = {name: np.zeros(SHAPES[name]) for name in sizes}
    clean, clean_kept = forward(params, batch, {})
    p, onehot = softmax(clean), np.eye(N)[label]
    total, grads = 0.0, {name: np.zeros(x.shape) for name, x in params.items()}
    weight = settings.kl_weight / (N if settings.kl_mean == "classes" else 1)
    for _ in range(settings.steps):
        for group in groups:
            logits, kept = forward(params, batch, {name: noise[name] for name in group})
            q = softmax(logits)
            share = 1 / (settings.steps * len(groups))
            both = ((p - q) * np.log(p / q)).sum(-1)
            total += share * (-np.log(q[np.arange(B), label]) + weight * both).mean()
            by_logits = share / B * (q - onehot + weight * divergence_gradient(p, q))
            parts, by_noise = backward(params, kept, by_logits)
            if settings.clean_gradient:
                by_clean = share / B * weight * divergence_gradient(q, p)
                more = backward(params, clean_kept, by_clean)[0]
                parts = {name: parts[name] + more[name] for name in parts}
            grads = {name: grads[name] + parts[name] for name in grads}
            for name in group:
                for b in range(B):
                    g, limit = by_noise[name][b], settings.max_norm
                    length = np.abs(g).max() if settings.norm == "linf" else np.linalg.norm(g)
                    noise[name][b] += sizes[name] * g / length
                    if limit and settings.norm == "linf":
                        noise[name][b] = noise[name][b].clip(-limit, limit)
                    elif limit and np.linalg.norm(noise[name][b]) > limit:
                        noise[name][b] *= limit / np.linalg.norm(noise[name][b])
    return total, grads


@pytest.mark.parametrize(
    "settings",
    [
        Adversarial(0.3, 0.5, kl_weight=1.5),
        Adversarial(0.0, 0.5, steps=2, kl_weight=0.7, kl_mean="classes", clean_gradient=False),
        Adversarial(0.4, 0.2, steps=4, norm="l2", max_norm=0.5),
        Adversarial(0.4, 0.2, norm="linf", max_norm=0.3, separate=True),
    ],
    ids=["both", "regions alone, fixed target", "projected", "linf, apart"],
)
def test_loss_and_gradients_are_those_of_the_loop(settings):
    params, batch, label = problem()
    args = as_jax(params, batch, label)
    fn = adversarial_loss(settings, pass_loss(settings), SHAPES)
    loss = pass_loss(settings)
    if settings.word_step == 0:

        def regions_alone(params, noise, *rest):
            assert set(noise) == {"regions"}
            return loss(params, {"words": jnp.zeros(SHAPES["words"]), **noise}, *rest)

        fn = adversarial_loss(settings, regions_alone, {"regions": SHAPES["regions"]})

    def tripled(params):
        value, aux = fn(params, jax.random.key(0), *args[1:])
        return 3 * value, aux

    (found, _), grads = jax.jit(jax.value_and_grad(tripled, has_aux=True))(args[0])
    expected, slow = slow_training(settings, params, batch, label)
    np.testing.assert_allclose(found, 3 * expected, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(grads[name], 3 * slow[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_passes_start_without_noise_step_evenly_hurt_more_and_draw_their_own_keys():
    settings = Adversarial(0.2, 0.3, steps=4, kl_weight=0.0)
    args = as_jax(*problem())
    inner = pass_loss(settings)

    def loss(params, noise, clean, key, *rest):
        value, (logits, aux) = inner(params, noise, clean, key, *rest)
        return value, (logits, {**aux, "key": jax.random.key_data(key)})

    _, aux = jax.jit(adversarial_loss(settings, loss, SHAPES))(args[0], jax.random.key(0), *args[1:])
    for name, size in (("words", 0.2), ("regions", 0.3)):
        noise = np.asarray(aux["noise"][name])
        assert noise.shape == (4, *SHAPES[name])
        np.testing.assert_array_equal(noise[0], 0.0)
        steps = np.linalg.norm(np.diff(noise, axis=0).reshape(3, B, -1), axis=-1)
        np.testing.assert_allclose(steps, size, rtol=1e-5)
    assert (np.diff(np.asarray(aux["value"])) > 0).all()  # small steps up the gradient
    assert len({tuple(key) for key in np.asarray(aux["key"]).tolist()}) == 4


@jax.custom_vjp
def counted(x):
    return jnp.sin(x)


counted.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cosh(x),))


def count(jaxpr, name):
    """How often a primitive runs; a scan's body as often as it is long."""
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inside = [
            x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else [value])
        ]
        bodies = [getattr(x, "jaxpr", x) for x in inside]
        total += (eqn.primitive.name == name) + times * sum(
            count(x, name) for x in bodies if hasattr(x, "eqns")
        )
    return total


@pytest.mark.parametrize(
    "settings,forwards,backwards",
    [
        (Adversarial(0.1, 0.1, steps=3), 4, 4),
        (Adversarial(0.1, steps=5, clean_gradient=False), 6, 5),
        (Adversarial(0.1, 0.1, steps=3, separate=True), 7, 7),
    ],
)
def test_the_cost_is_that_of_the_passes(settings, forwards, backwards):
    """Every pass goes through the marked function once in each direction."""

    def loss(params, noise, clean, key, x):
        logits = counted(params * x + sum(value.sum() for value in noise.values()))
        value = logits.sum()
        return (value if clean is None else value + symmetric_divergence(clean, logits).sum()), (logits, None)

    fn = adversarial_loss(settings, loss, {name: (2, 1, 3) for name in ("words", "regions")})
    step = jax.value_and_grad(lambda p, x: fn(p, jax.random.key(0), x)[0])
    jaxpr = jax.make_jaxpr(step)(jnp.float32(0.5), jnp.ones((2, 3))).jaxpr
    assert (count(jaxpr, "sin"), count(jaxpr, "cosh")) == (forwards, backwards)
    assert count(jaxpr, "scan") == 1  # the passes are compiled once, whatever their number


def test_in_a_training_step_it_moves_what_trains_by_the_loop_s_gradient():
    settings = PRESETS["vcr_large"]
    params, batch, label = problem()
    ours, *rest = as_jax(params, batch, label)
    optimizer = make_optimizer(
        {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0, "multipliers": {"^v$": 0.0}}, ours, 10
    )

    def loss_fn(params, model_state, frozen, batch, rng, step):
        value, aux = adversarial_loss(settings, pass_loss(settings), SHAPES)(params, rng, *batch)
        return value, ({"passes": (aux["noise"]["words"].sum(), jnp.float32(len(aux["value"])))}, model_state)

    start = TrainState(jnp.int32(0), ours, {}, optimizer.init(ours))
    after, metrics = make_train_step(loss_fn, optimizer)(start, None, tuple(rest))
    value, grads = slow_training(settings, params, batch, label)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-5)
    assert float(metrics["passes"][1]) == 3
    for name, x in params.items():
        moved = x if name == "v" else x - 0.1 * grads[name]
        np.testing.assert_allclose(after.params[name], moved, rtol=1e-5, atol=1e-5, err_msg=name)


def test_nothing_valid_gives_finite_numbers_and_no_noise():
    settings = Adversarial(0.1, 0.1, max_norm=0.05)
    args = as_jax(*problem())
    inner = pass_loss(settings)

    def loss(params, noise, clean, key, *rest):
        value, kept = inner(params, noise, clean, key, *rest)
        return value * 0.0, kept

    fn = adversarial_loss(settings, loss, SHAPES)
    (value, aux), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(args[0], jax.random.key(0), *args[1:])
    assert float(value) == 0.0
    for x in jax.tree.leaves((grads, aux["noise"])):
        np.testing.assert_array_equal(x, 0.0)


def test_an_example_that_no_loss_sees_keeps_no_noise():
    noise = {"words": jnp.zeros((2, 3, 4))}
    gradient = {"words": jnp.zeros((2, 3, 4)).at[1, 2].set(jnp.array([3.0, 0.0, 4.0, 0.0]))}
    moved = move(Adversarial(0.5), noise, gradient)["words"]
    np.testing.assert_array_equal(moved[0], 0.0)
    np.testing.assert_allclose(moved[1, 2], [0.3, 0.0, 0.4, 0.0], rtol=1e-6)
    largest = move(Adversarial(0.5, norm="linf"), noise, gradient)["words"]
    np.testing.assert_allclose(largest[1, 2], [0.375, 0.0, 0.5, 0.0], rtol=1e-6)


def test_a_step_is_whole_however_small_the_gradient_of_a_mean():
    gradient = {"words": jnp.full((1, 3, 4), 1e-12)}
    moved = move(Adversarial(0.5), {"words": jnp.zeros((1, 3, 4))}, gradient)["words"]
    np.testing.assert_allclose(moved, 0.5 / np.sqrt(12), rtol=1e-6)


def test_choices_are_steps_of_their_own():
    gradient = {"words": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 5)), jnp.float32)}
    moved = move(Adversarial(0.5), {"words": jnp.zeros((2, 4, 3, 5))}, gradient)["words"]
    np.testing.assert_allclose(np.linalg.norm(moved.reshape(8, -1), axis=1), 0.5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2)])
def test_the_divergence_is_both_kls(shape):
    rng = np.random.default_rng(0)
    clean, noisy = rng.normal(size=shape) * 3, rng.normal(size=shape) * 3
    p, q = softmax(clean), softmax(noisy)
    slow = (p * np.log(p / q) + q * np.log(q / p)).sum(-1).reshape(3, -1).mean(1)
    args = jnp.asarray(clean, jnp.float32), jnp.asarray(noisy, jnp.float32)
    np.testing.assert_allclose(symmetric_divergence(*args), slow, rtol=1e-5)
    np.testing.assert_allclose(symmetric_divergence(*args, "classes"), slow / shape[-1], rtol=1e-5)
    np.testing.assert_array_equal(symmetric_divergence(args[0], args[0]), 0.0)


def test_a_task_with_divergence():
    rng = np.random.default_rng(0)
    clean, noisy = (jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32) for _ in range(2))
    batch = {"label": jnp.array([0, -1, 2]), "mask": jnp.ones(3, bool)}
    task, settings = choice_task("pairs"), PRESETS["vcr_base"]
    loss, valid, metrics = task(Features(logits=noisy), batch)
    found = with_divergence(task, settings, clean)(Features(logits=noisy), batch)
    divergence = symmetric_divergence(clean, noisy, "classes")
    np.testing.assert_allclose(found[0], loss + 1.5 * divergence, rtol=1e-6)
    np.testing.assert_array_equal(found[1], valid)
    np.testing.assert_allclose(found[2]["divergence"], divergence, rtol=1e-6)
    np.testing.assert_array_equal(found[2]["accuracy"], metrics["accuracy"])
    assert with_divergence(task, settings, None) is task


def test_the_divergence_of_sure_opposites_is_finite():
    clean, noisy = jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]])
    found, grads = jax.value_and_grad(lambda c, n: symmetric_divergence(c, n).sum(), (0, 1))(clean, noisy)
    np.testing.assert_allclose(found, 4e4, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in grads)


def test_the_presets_are_villa_s():
    found = {
        name: (s.word_step, s.region_step, s.steps, s.norm, s.max_norm, s.kl_weight, s.kl_mean)
        for name, s in PRESETS.items()
    }
    assert found == {
        "vcr_base": (0.01, 0.01, 3, "l2", 0.0, 1.5, "classes"),
        "vcr_large": (0.1, 0.1, 3, "l2", 0.0, 1.0, "classes"),
        "vqa_base": (0.001, 0.0, 3, "l2", 0.0, 1.5, "sum"),
        "vqa_large": (0.002, 0.0, 3, "l2", 0.0, 1.0, "sum"),
        "ve_base": (0.001, 0.0, 3, "l2", 0.0, 1.5, "sum"),
        "ve_large": (0.001, 0.0, 3, "l2", 0.0, 1.5, "sum"),
    }


@pytest.mark.parametrize(
    "fields,message",
    [
        ({}, "both 0"),
        ({"word_step": -1.0}, "0 or more"),
        ({"word_step": 0.1, "steps": 0}, "steps is 0"),
        ({"word_step": 0.1, "norm": "l1"}, "norm is 'l1'; it can be l2 or linf"),
        ({"word_step": 0.1, "kl_mean": "batch"}, "kl_mean is 'batch'"),
        ({"word_step": 0.1, "separate": True}, "both word_step and region_step"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Adversarial(**fields)


def test_a_model_without_such_an_input_is_refused():
    with pytest.raises(ValueError, match="shapes lacks regions"):
        adversarial_loss(Adversarial(0.1, 0.1), lambda *a: a, {"words": (1, 2, 3)})
