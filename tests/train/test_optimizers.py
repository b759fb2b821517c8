import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from clipdistill_jax.train.optimizers import OptimizerConfig, make_optimizer

NAMES = {
    "vision/block/kernel": (3, 4),
    "vision/block/bias": (4,),
    "vision/norms/scale": (2, 4),  # scanned layers: a norm of two dimensions
    "vision/class_embedding": (1, 4),
    "vision/position_embedding/embedding": (5, 4),
    "text/token_embedding/embedding": (6, 4),
    "text/block/kernel": (4, 4),
    "logit_scale": (),
}
DECAYED = {"vision/block/kernel", "text/token_embedding/embedding", "text/block/kernel"}


def nest(flat):
    tree = {}
    for name, x in flat.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(x, jnp.float32)
    return tree


def flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in NAMES.items()}


def run(config, steps, gradients):
    params = nest(draw(0))
    optimizer = make_optimizer(config, params, steps)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p, i: optimizer.update(g, s, p, step=i))
    for i in range(steps):
        updates, state = update(nest(gradients(i)), state, params, i)
        params = optax.apply_updates(params, updates)
    return flatten(params), state


def slow_adamw(gradients, steps, rate, multiplier, decay, clip, b1=0.8, b2=0.9, eps=1e-6):
    """Loshchilov and Hutter 2019, algorithm 2, in float64, after clipping by the norm of what trains."""
    params = draw(0)
    first = {name: 0.0 for name in NAMES}
    second = {name: 0.0 for name in NAMES}
    for i in range(steps):
        grads = gradients(i)
        norm = np.sqrt(sum((grads[name] ** 2).sum() for name in NAMES if multiplier(name)))
        for name in NAMES:
            g = grads[name] * min(1.0, clip / norm)
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g * g
            spread = np.sqrt(second[name] / (1 - b2 ** (i + 1))) + eps
            direction = first[name] / (1 - b1 ** (i + 1)) / spread
            if name in DECAYED:
                direction = direction + decay * params[name]
            params[name] = params[name] - rate(i) * multiplier(name) * direction
    return params


def test_adamw_with_parts_decay_clipping_and_warmup_against_numpy():
    config = {
        "learning_rate": {"kind": "linear", "value": 0.1, "warmup_steps": 2},
        "weight_decay": 0.3,
        "clip_norm": 1.5,
        "b1": 0.8,
        "b2": 0.9,
        "eps": 1e-6,
        "multipliers": [("^vision/position", 0.0), ("^vision/", 0.1)],
    }

    def rate(i):
        return 0.1 * i / 2 if i < 2 else 0.1 * (1 - (i - 2) / 4)

    def multiplier(name):
        return 0.0 if name.startswith("vision/position") else 0.1 if name.startswith("vision/") else 1.0

    found, state = run(config, 6, lambda i: draw(i + 1))
    expected = slow_adamw(lambda i: draw(i + 1), 6, rate, multiplier, 0.3, 1.5)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    frozen = "vision/position_embedding/embedding"
    np.testing.assert_array_equal(found[frozen], np.float32(draw(0)[frozen]))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * (len(NAMES) - 2)  # none for what is frozen; logit_scale's have no dimension
    assert all(x.dtype == jnp.float32 for x in moments)


def test_sgd_with_momentum_by_hand():
    config = OptimizerConfig(name="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    found, _ = run(config, 2, lambda i: draw(1))
    for name, g in draw(1).items():
        p = draw(0)[name]
        decay = 0.1 if name in DECAYED else 0.0
        p = p - 0.5 * (g + decay * p)
        p = p - 0.5 * (1.9 * g + decay * p)
        np.testing.assert_allclose(found[name], p, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_decays_and_what_is_said_of_it():
    optimizer = make_optimizer({"multipliers": (("text", 0.0), ("block", 0.5))}, nest(draw(0)), 1)
    assert {name for name, part in optimizer.parts.items() if part.decays} == DECAYED
    table = {line.split()[-1]: line for line in optimizer.describe().splitlines()[1:]}
    assert table.keys() == NAMES.keys()
    assert table["text/block/kernel"].startswith("frozen")  # the first match wins
    assert table["vision/block/kernel"].split()[:2] == ["0.5", "yes"]
    assert table["vision/norms/scale"].split()[:2] == ["1", "no"]


def test_bfloat16_parameters_are_refused():
    params = nest(draw(0))
    params["text"]["block"]["kernel"] = params["text"]["block"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="text/block/kernel is bfloat16"):
        make_optimizer({}, params, 1)


def test_a_config_dict_will_do():
    given = ConfigDict(
        {"name": "sgd", "learning_rate": {"kind": "steps", "boundaries": [3]}, "multipliers": []}
    )
    given.multipliers = (("^text/", 0.5),)
    optimizer = make_optimizer(given, nest(draw(0)), 9)
    assert optimizer.parts["text/block/kernel"].multiplier == 0.5
    assert float(optimizer.learning_rate(3)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"multipliers": (("visoin/", 0.1),)}, "'visoin/' decides for no parameter"),
        ({"multipliers": (("vision", 0.1), ("vision/b", 1.0))}, "'vision/b' decides for no parameter"),
        ({"learning_rat": 0.1}, "no field 'learning_rat'; did you mean 'learning_rate'"),
        ({"name": "adam"}, "'adam' is not one of adamw, sgd"),
    ],
)
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, nest(draw(0)), 1)
