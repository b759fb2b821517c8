"""The BERT encoder and its text tower: sizes, masks, dropout, recomputation, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.bert import (
    PRESETS,
    BertConfig,
    BertEmbeddings,
    BertEncoder,
    BertPooler,
    param_shapes,
)
from clipdistill_jax.models.bert_text import BertText
from clipdistill_jax.models.build import build_model

CONFIG = BertConfig(vocab_size=50, context_length=12, width=24, layers=1, heads=2, mlp_width=40)


def key(seed: int) -> jax.Array:
    """A key whose random bits compile fast; dropout is a lot of them."""
    return jax.random.key(seed, impl="unsafe_rbg")


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def random_params(module, *inputs, **options):
    """Made here: an initialisation compiles longer than the model."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (0.1 * rng.normal(size=x.shape) + (path[-1].key == "scale")).astype(np.float32)

    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(2).integers(1, 50, (3, 10)).astype(np.int32)
    token_mask = np.arange(10) < np.array([[10], [6], [3]])
    tower = BertText(CONFIG, projection_dim=16)
    return tower, random_params(tower, tokens, token_mask), tokens, token_mask


@pytest.fixture(scope="module")
def apply(text):
    return jax.jit(text[0].apply)


@pytest.fixture(scope="module")
def encoder():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, 24)), jnp.float32)
    mask = jnp.asarray(np.arange(10) < np.array([[10], [6], [0]]))[:, None, None]
    module = BertEncoder(CONFIG)
    return module, random_params(module, x, mask), x, mask


@pytest.mark.parametrize(
    "preset, parameters", [("tiny_4x312", 14_350_248), ("base", 109_482_240), ("large", 335_141_888)]
)
def test_parameter_counts(preset, parameters):
    """Counts of the published models with 30,522 entries, pooler included; all blocks are of one size."""
    c = PRESETS[preset]
    shapes = param_shapes(dataclasses.replace(c, layers=1))
    (block,) = map(count, shapes["encoder"].values())
    assert count(shapes) + (c.layers - 1) * block == parameters


def test_parameter_counts_of_tinybert_by_part():
    c = PRESETS["tiny_4x312"]
    shapes = param_shapes(c, pooler=False)
    assert count(shapes) == 14_350_248 - c.width * (c.width + 1)
    assert count(shapes["encoder"]) == 4_568_736
    assert count(shapes["embeddings"]) == 9_683_856


def test_the_tower_gives_what_a_text_tower_gives(text, apply):
    tower, params, tokens, token_mask = text
    out = apply(params, tokens, token_mask)
    assert out.embedding.shape == (3, 16) and out.tokens.shape == (3, 10, 16)
    assert [x.shape for x in out.hidden] == [(3, 10, 24)] * 2
    np.testing.assert_array_equal(out.embedding, out.tokens[:, 0])
    kernel = params["params"]["projection"]["kernel"]
    np.testing.assert_allclose(out.tokens, np.asarray(out.hidden[-1]) @ kernel, atol=1e-6)
    assert set(params["params"]) == {"embeddings", "encoder", "projection"}


def test_padding_has_no_influence(text, apply):
    _, params, tokens, token_mask = text
    out = apply(params, tokens, token_mask)
    other = apply(params, np.where(token_mask, tokens, 7), token_mask)
    np.testing.assert_array_equal(np.asarray(other.tokens)[token_mask], np.asarray(out.tokens)[token_mask])
    # A row by itself, without its padding: another order of summation.
    short = apply(params, tokens[1:2, :6], token_mask[1:2, :6])
    np.testing.assert_allclose(short.tokens, out.tokens[1:2, :6], atol=2e-6)
    # Attention looks both ways: the first token sees the last.
    last = np.arange(10) == 9
    changed = apply(params, np.where(last, (tokens + 1) % 50, tokens), token_mask)
    assert np.abs(changed.embedding[0] - out.embedding[0]).max() > 1e-4


def test_attention_weights_are_distributions_over_real_tokens(encoder):
    module, params, x, mask = encoder
    seen = jax.jit(lambda p: module.apply(p, x, mask, attention=True))(params)
    plain = jax.jit(lambda p: module.apply(p, x, mask))(params)
    assert plain.attention == () and len(seen.hidden) == 2
    jax.tree.map(np.testing.assert_array_equal, seen.hidden, plain.hidden)
    assert [a.shape for a in seen.attention] == [(3, 2, 10, 10)]
    for weights in map(np.asarray, seen.attention):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert (weights[1, :, :, 6:] == 0).all() and (weights[0] > 0).all()
        np.testing.assert_allclose(weights[2], 0.1, atol=1e-7)  # nothing to look at: the plain mean


def test_nothing_to_look_at_is_finite(encoder):
    module, params, x, mask = encoder
    loss = jax.jit(jax.value_and_grad(lambda x: jnp.sum(module.apply(params, x, mask).hidden[-1] ** 3)))
    value, gradient = loss(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_mask_of_pairs_is_a_mask_of_pairs(encoder):
    """A causal mask: a token's state depends on those before it alone."""
    module, params, x, _ = encoder
    causal = jnp.asarray(np.tril(np.ones((1, 1, 10, 10), bool)))
    run = jax.jit(lambda x: module.apply(params, x, causal).hidden[-1])
    later = (np.arange(10) >= 6)[:, None]
    # Not a shift, which a layer norm takes off.
    first, second = run(x), run(np.where(later, np.asarray(x) ** 2, x))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(first[:, 6:] - second[:, 6:]).max() > 1e-3


def test_dropout_only_in_training_and_of_the_right_rate(text, apply):
    tower, params, tokens, token_mask = text
    never = dataclasses.replace(CONFIG, dropout=0.0, attention_dropout=0.0)

    def training(config):
        @jax.jit
        def run(key):
            rngs = None if config == never else {"dropout": key}  # none is needed then
            module = tower.clone(config=config)
            return module.apply(params, tokens, token_mask, train=True, rngs=rngs).embedding

        return run

    calm = apply(params, tokens, token_mask).embedding
    for field in ("dropout", "attention_dropout"):  # each by itself does something
        run = training(dataclasses.replace(never, **{field: 0.5}))
        first, second = run(key(1)), run(key(2))
        assert np.abs(first - calm).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(training(never)(key(1)), calm, atol=1e-6)

    embeddings = BertEmbeddings(dataclasses.replace(CONFIG, dropout=0.25))

    @jax.jit
    def finish(key):
        bound = embeddings.bind({"params": params["params"]["embeddings"]}, rngs={"dropout": key})
        x = jnp.ones((40, 50, 24)) + jnp.arange(24.0)
        return bound.finish(x), bound.finish(x, train=True)

    normed, dropped = map(np.asarray, finish(key(0)))
    zero = dropped == 0
    assert abs(zero.mean() - 0.25) < 0.01  # 48,000 draws: a deviation of 0.002
    np.testing.assert_allclose(dropped[~zero], normed[~zero] / 0.75, rtol=1e-6)


def test_embeddings_add_up_and_types_count(text):
    """Against NumPy: LN(token + position + type)."""
    _, params, tokens, _ = text
    tables = jax.tree.map(np.asarray, params["params"]["embeddings"])
    tables["ln"] = {"scale": np.linspace(0.5, 2, 24), "bias": np.linspace(-1, 1, 24)}
    types = np.arange(30).reshape(3, 10) % 2
    names = ("token_embedding", "position_embedding", "type_embedding")
    word, position, kind = (tables[name]["embedding"].astype(np.float64) for name in names)
    total = word[np.asarray(tokens)] + position[:10] + kind[types]
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    expected = expected * tables["ln"]["scale"] + tables["ln"]["bias"]
    run = jax.jit(lambda *types: BertEmbeddings(CONFIG).apply({"params": tables}, tokens, *types))
    np.testing.assert_allclose(run(types), expected, atol=5e-6)
    np.testing.assert_allclose(run(types * 0), run(), atol=1e-6)


def test_remat_changes_neither_values_nor_gradients_nor_dropout(encoder):
    module, params, x, mask = encoder

    def loss(params, module):
        out = module.apply(params, x, mask, train=True, rngs={"dropout": key(3)})
        return jnp.sum(jnp.sin(out.hidden[-1]))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    again = module.clone(remat=True)
    equations = jax.make_jaxpr(loss, static_argnums=1)(params, again).eqns
    assert sum(equation.primitive.name == "remat2" for equation in equations) == 1

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * max(1.0, float(np.abs(x).max())))

    jax.tree.map(close, gradient(params, module), gradient(params, again))


def test_bfloat16_computes_near_float32_with_float32_parameters(text, apply):
    tower, params, tokens, token_mask = text
    half = tower.clone(dtype=jnp.bfloat16)
    made = jax.eval_shape(half.init, jax.random.key(0), tokens, token_mask)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    a, b = (run(params, tokens, token_mask).embedding for run in (apply, jax.jit(half.apply)))
    assert b.dtype == jnp.bfloat16
    a, b = np.asarray(a), np.asarray(b, np.float32)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.999  # 8 bits of mantissa through a block
    assert np.abs(a - b).max() > 0  # it did compute in bfloat16
    module = BertEncoder(CONFIG, jnp.bfloat16)
    x = jnp.zeros((1, 4, 24), jnp.bfloat16)
    shapes = jax.eval_shape(lambda key: module.init_with_output(key, x, attention=True)[0], jax.random.key(0))
    assert shapes.attention[0].dtype == jnp.float32 and shapes.hidden[-1].dtype == jnp.bfloat16


def test_wrong_sizes_and_names_are_refused(text):
    tower, params, _, _ = text
    with pytest.raises(ValueError, match="13 tokens a text, but BERT has 12 positions"):
        jax.eval_shape(tower.apply, params, jnp.ones((1, 13), jnp.int32), jnp.ones((1, 13), bool))
    odd = BertEncoder(dataclasses.replace(CONFIG, heads=5))
    with pytest.raises(ValueError, match="the width 24 does not divide over 5 heads"):
        jax.eval_shape(odd.init, jax.random.key(0), jnp.zeros((1, 3, 24)))
    spec = {"kind": "clip", "text": {"kind": "bert", "widht": 4}}
    with pytest.raises(ValueError, match="text tower 'bert'.*widht"):
        build_model(spec)
    with pytest.raises(ValueError, match="text tower 'bert'.*tiny"):
        build_model({"kind": "clip", "text": {"kind": "bert", "preset": "tiny"}})


def test_a_config_names_the_text_towers_of_clipping():
    """CLIP's first 4 layers, and TinyBERT."""

    def text_of(**spec):
        tower = build_model({"kind": "clip", "text": spec}, vocab_size=1000).text
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        shapes = jax.eval_shape(tower.init, jax.random.key(0), tokens, tokens.update(dtype=bool))["params"]
        return tower, shapes

    _, four = text_of(kind="clip", preset="ViT-B/32", layers=4)
    assert count(four["transformer"]) == 12_609_536
    assert sorted(four["transformer"]) == ["block_0", "block_1", "block_2", "block_3"]
    tower, tiny = text_of(kind="bert", preset="tiny_4x312", projection_dim=512, dropout=0.0)
    assert tower.config == dataclasses.replace(PRESETS["tiny_4x312"], vocab_size=1000, dropout=0.0)
    assert count(tiny["encoder"]) == 4_568_736 and tiny["projection"]["kernel"].shape == (312, 512)


def test_the_pooler_is_tanh_of_a_dense_layer(encoder):
    _, _, x, _ = encoder
    pooler = BertPooler()
    params = random_params(pooler, x)
    dense = params["params"]["dense"]
    expected = np.tanh(np.asarray(x)[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(jax.jit(pooler.apply)(params, x), expected, atol=1e-6)


def test_parameter_names_suit_rules_by_name():
    """Sharding and weight decay are decided by these names."""
    known = ("kernel", "bias", "scale", "embedding")
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(CONFIG)):
        parts = [str(key.key) for key in path]
        assert parts[-1] in known
        assert parts[-1] != "scale" or parts[-2] in ("ln", "ln_1", "ln_2")
        assert parts[-1] not in ("kernel", "embedding") or leaf.ndim == 2
