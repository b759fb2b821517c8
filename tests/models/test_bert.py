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
from clipdistill_jax.models.dual_encoder import mean_by_word

CONFIG = BertConfig(vocab_size=50, context_length=12, width=24, layers=2, heads=2, mlp_width=40)


def key(seed: int) -> jax.Array:
    """A key whose random bits compile fast; dropout is a lot of them."""
    return jax.random.key(seed, impl="unsafe_rbg")


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def text():
    tokens = jax.random.randint(jax.random.key(2), (3, 10), 1, 50)
    token_mask = jnp.arange(10) < jnp.array([[10], [6], [3]])
    tower = BertText(CONFIG, projection_dim=16)
    return tower, jax.jit(tower.init)(jax.random.key(0), tokens, token_mask), tokens, token_mask


@pytest.fixture(scope="module")
def encoder():
    x = jax.random.normal(jax.random.key(1), (3, 10, 24))
    mask = (jnp.arange(10) < jnp.array([[10], [6], [0]]))[:, None, None]
    module = BertEncoder(CONFIG)
    return module, jax.jit(module.init)(jax.random.key(0), x, mask), x, mask


@pytest.mark.parametrize(
    "preset, parameters", [("tiny_4x312", 14_350_248), ("base", 109_482_240), ("large", 335_141_888)]
)
def test_parameter_counts(preset, parameters):
    """Counts of the published models with 30,522 entries, pooler included."""
    shapes = param_shapes(PRESETS[preset])
    assert count(shapes) == parameters
    c = PRESETS[preset]
    assert count(param_shapes(c, pooler=False)) == parameters - c.width * (c.width + 1)
    if preset == "tiny_4x312":
        assert count(shapes["encoder"]) == 4_568_736
        assert count(shapes["embeddings"]) == 9_683_856


def test_the_tower_gives_what_a_text_tower_gives(text):
    tower, params, tokens, token_mask = text
    out = jax.jit(tower.apply)(params, tokens, token_mask)
    assert out.embedding.shape == (3, 16) and out.tokens.shape == (3, 10, 16)
    assert [x.shape for x in out.hidden] == [(3, 10, 24)] * 3
    np.testing.assert_array_equal(out.embedding, out.tokens[:, 0])
    kernel = params["params"]["projection"]["kernel"]
    np.testing.assert_allclose(out.tokens, out.hidden[-1] @ kernel, atol=1e-6)
    assert set(params["params"]) == {"embeddings", "encoder", "projection"}


def test_padding_has_no_influence(text):
    tower, params, tokens, token_mask = text
    apply = jax.jit(tower.apply)
    out = apply(params, tokens, token_mask)
    other = apply(params, jnp.where(token_mask, tokens, 7), token_mask)
    kept = np.asarray(token_mask)
    np.testing.assert_array_equal(np.asarray(other.tokens)[kept], np.asarray(out.tokens)[kept])
    # A row by itself, without its padding: another order of summation.
    short = apply(params, tokens[1:2, :6], token_mask[1:2, :6])
    np.testing.assert_allclose(short.tokens, out.tokens[1:2, :6], atol=2e-6)
    # Attention looks both ways: the first token sees the last.
    changed = apply(params, tokens.at[0, 9].set((tokens[0, 9] + 1) % 50), token_mask)
    assert np.abs(changed.embedding[0] - out.embedding[0]).max() > 1e-4


def test_attention_weights_are_distributions_over_real_tokens(encoder):
    module, params, x, mask = encoder
    seen = jax.jit(lambda p: module.apply(p, x, mask, attention=True))(params)
    plain = jax.jit(lambda p: module.apply(p, x, mask))(params)
    assert plain.attention == () and len(seen.hidden) == 3
    jax.tree.map(np.testing.assert_array_equal, seen.hidden, plain.hidden)
    assert [a.shape for a in seen.attention] == [(3, 2, 10, 10)] * 2
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
    causal = jnp.tril(jnp.ones((1, 1, 10, 10), bool))
    apply = jax.jit(lambda x: module.apply(params, x, causal).hidden[-1])
    first, second = apply(x), apply(x.at[:, 6:].add(1.0))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(first[:, 6:] - second[:, 6:]).max() > 1e-3


def test_dropout_only_in_training_and_of_the_right_rate(text):
    tower, params, tokens, token_mask = text

    def train(tower, seed):
        rngs = {"dropout": key(seed)}
        run = jax.jit(lambda p: tower.apply(p, tokens, token_mask, train=True, rngs=rngs).embedding)
        return np.asarray(run(params))

    calm = jax.jit(tower.apply)(params, tokens, token_mask).embedding
    assert np.abs(train(tower, 1) - train(tower, 2)).max() > 1e-3
    never = dataclasses.replace(CONFIG, dropout=0.0, attention_dropout=0.0)
    for field in ("dropout", "attention_dropout"):  # each by itself does something
        only = dataclasses.replace(never, **{field: 0.5})
        assert np.abs(train(tower.clone(config=only), 1) - calm).max() > 1e-3
    still = tower.clone(config=never).apply(params, tokens, token_mask, train=True)  # no key needed
    np.testing.assert_allclose(still.embedding, calm, atol=1e-6)

    embeddings = BertEmbeddings(dataclasses.replace(CONFIG, dropout=0.25))
    x = jnp.ones((40, 50, 24))
    bound = embeddings.bind({"params": params["params"]["embeddings"]}, rngs={"dropout": key(0)})
    normed = bound.finish(x + jnp.arange(24.0))
    dropped = bound.finish(x + jnp.arange(24.0), train=True)
    zero = np.asarray(dropped == 0)
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
    found = BertEmbeddings(CONFIG).apply({"params": tables}, tokens, types)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    zeros = BertEmbeddings(CONFIG).apply({"params": tables}, tokens, types * 0)
    np.testing.assert_array_equal(zeros, BertEmbeddings(CONFIG).apply({"params": tables}, tokens))


def test_remat_changes_neither_values_nor_gradients_nor_dropout(encoder):
    module, params, x, mask = encoder
    module = module.clone(config=dataclasses.replace(CONFIG, layers=1))  # a gradient compiles slowly

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


def test_bfloat16_computes_near_float32_with_float32_parameters(text):
    tower, params, tokens, token_mask = text
    half = tower.clone(dtype=jnp.bfloat16)
    made = jax.eval_shape(half.init, jax.random.key(0), tokens, token_mask)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    a, b = (jax.jit(m.apply)(params, tokens, token_mask).embedding for m in (tower, half))
    assert b.dtype == jnp.bfloat16
    a, b = np.asarray(a), np.asarray(b, np.float32)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.999  # 8 bits of mantissa through two blocks
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
    """CLIP's 12 layers, its first 4, and TinyBERT; blocks of 12,609,536 and 37,828,608 parameters."""

    def text_of(**spec):
        tower = build_model({"kind": "clip", "text": spec}, vocab_size=1000).text
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        shapes = jax.eval_shape(tower.init, jax.random.key(0), tokens, tokens.update(dtype=bool))["params"]
        return tower, shapes

    _, whole = text_of(kind="clip", preset="ViT-B/32")
    assert count(whole["transformer"]) == 37_828_608
    tower, four = text_of(kind="clip", preset="ViT-B/32", layers=4)
    assert count(four["transformer"]) == 12_609_536
    assert sorted(four["transformer"]) == ["block_0", "block_1", "block_2", "block_3"]
    tower, tiny = text_of(kind="bert", preset="tiny_4x312", projection_dim=512, dropout=0.0)
    assert tower.config == dataclasses.replace(PRESETS["tiny_4x312"], vocab_size=1000, dropout=0.0)
    assert count(tiny["encoder"]) == 4_568_736 and tiny["projection"]["kernel"].shape == (312, 512)


def test_words_of_the_tower_are_means_of_their_tokens(text):
    tower, params, tokens, token_mask = text
    word_ids = jnp.where(token_mask, jnp.array([-1, 0, 0, 1, 2, -1, 3, 4, 5, -1]), -1)
    states = jax.jit(tower.apply)(params, tokens, token_mask).tokens
    words, mask = mean_by_word(states, word_ids)
    np.testing.assert_allclose(words[1, 0], (states[1, 1] + states[1, 2]) / 2, atol=1e-6)
    assert mask[1].tolist() == [True] * 3 + [False] * 7


def test_the_pooler_is_tanh_of_a_dense_layer(encoder):
    _, _, x, _ = encoder
    pooler = BertPooler()
    params = pooler.init(jax.random.key(0), x)
    dense = jax.tree.map(np.asarray, params["params"]["dense"])
    expected = np.tanh(np.asarray(x)[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(pooler.apply(params, x), expected, atol=1e-6)


def test_parameter_names_suit_rules_by_name():
    """Sharding and weight decay are decided by these names."""
    known = ("kernel", "bias", "scale", "embedding")
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(CONFIG)):
        parts = [str(key.key) for key in path]
        assert parts[-1] in known
        assert parts[-1] != "scale" or parts[-2] in ("ln", "ln_1", "ln_2")
        assert parts[-1] not in ("kernel", "embedding") or leaf.ndim == 2
