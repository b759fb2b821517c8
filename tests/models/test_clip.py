"""Behaviour of the CLIP towers; their numerical parity is in tests/convert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from clipdistill_jax.models.clip import (
    PRESETS,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
    interpolate_positions,
    param_shapes,
)
from clipdistill_jax.models.image import normalize, resize_to
from clipdistill_jax.models.layers import Attention, Transformer, activation

VISION = ClipVisionConfig(
    image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_width=64, projection_dim=16
)
TEXT = ClipTextConfig(
    vocab_size=50, context_length=12, width=32, layers=1, heads=2, mlp_width=64, projection_dim=16
)


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def random_params(module, *inputs):
    """Made here: an initialisation compiles longer than the model."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (0.1 * rng.normal(size=x.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(module.init, jax.random.key(0), *inputs))


@pytest.fixture(scope="module")
def vision():
    images = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    tower = ClipVision(VISION)
    return tower, random_params(tower, images), images


@pytest.fixture(scope="module")
def see(vision):
    return jax.jit(vision[0].apply)


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(2).integers(1, 50, (3, 10)).astype(np.int32)
    token_mask = np.arange(10) < np.array([[10], [6], [3]])
    tower = ClipText(TEXT)
    return tower, random_params(tower, tokens, token_mask), tokens, token_mask


@pytest.fixture(scope="module")
def read(text):
    return jax.jit(text[0].apply)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336", 427_944_193),
    ],
)
def test_parameter_counts_of_the_presets(name, parameters):
    """Counts of the torch models that OpenAI published; all blocks of a tower are of one size."""
    towers = dict(zip(("vision", "text"), PRESETS[name], strict=True))
    shapes = param_shapes(*(dataclasses.replace(tower, layers=1) for tower in towers.values()))
    counts = {
        side: count(shapes[side]) + (tower.layers - 1) * count(shapes[side]["transformer"])
        for side, tower in towers.items()
    }
    assert sum(counts.values()) + 1 == parameters  # the logit scale
    if name == "ViT-B/32":
        assert counts == {"vision": 87_849_216, "text": 63_428_096}
    assert all(tower.heads == tower.width // 64 for tower in towers.values())


def test_vision_shapes_and_layers(vision, see):
    _, params, images = vision
    out = see(params, images)
    assert out.embedding.shape == (3, 16)
    assert [x.shape for x in out.layers] == [(3, 4, 4, 32)]
    assert [x.shape for x in out.hidden] == [(3, 17, 32)] * 2
    # A layer is the block's tokens without the class token, row by row.
    np.testing.assert_array_equal(out.layers[0][:, 1, 2], out.hidden[1][:, 1 + 1 * 4 + 2])


def test_patch_map_keeps_the_place_of_a_patch(vision, see):
    _, params, images = vision
    moved = images.copy()
    moved[:, 8:16, 24:32] = 0.0  # patch in row 1, column 3
    a, b = (np.asarray(see(params, x).hidden[0])[:, 1:].reshape(3, 4, 4, 32) for x in (images, moved))
    changed = np.abs(a - b).max(axis=(0, 3)) > 0
    assert np.argwhere(changed).tolist() == [[1, 3]]


def test_uint8_is_normalised_and_other_sizes_are_resized(vision, see):
    tower, params, _ = vision
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    expected = see(params, jax.jit(lambda x: normalize(resize_to(x, 32)))(frames)).embedding
    np.testing.assert_allclose(see(params, frames).embedding, expected, atol=1e-6)
    with pytest.raises(ValueError, match="uint8 or float"):
        jax.eval_shape(tower.apply, params, jnp.zeros((1, 32, 32, 3), bool))


def test_end_of_text_is_the_last_true_of_the_mask(text, read):
    _, params, tokens, token_mask = text
    out = read(params, tokens, token_mask)
    assert [x.shape for x in out.hidden] == [(3, 10, 32)] * 2
    for row, end in enumerate([9, 5, 2]):
        np.testing.assert_array_equal(out.embedding[row], out.tokens[row, end])
    # Padding comes later, and attention is causal: what the padding is does not matter.
    other = np.where(token_mask, tokens, 0)
    np.testing.assert_array_equal(read(params, other, token_mask).embedding, out.embedding)
    # A shorter row of positions gives the same states.
    short = read(params, tokens[:, :6], token_mask[:, :6])
    np.testing.assert_allclose(short.tokens, out.tokens[:, :6], atol=1e-6)


def test_too_many_tokens_are_refused(text):
    tower, params, _, _ = text
    with pytest.raises(ValueError, match="13 tokens a text, but the text tower has 12 positions"):
        jax.eval_shape(tower.apply, params, jnp.ones((1, 13), jnp.int32), jnp.ones((1, 13), bool))


def test_remat_changes_neither_values_nor_gradients(text):
    tower, params, tokens, token_mask = text

    def loss(params, tower):
        return jnp.sum(jnp.sin(tower.apply(params, tokens, token_mask).embedding))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    again = tower.clone(remat=True)
    equations = jax.make_jaxpr(loss, static_argnums=1)(params, again).eqns
    assert sum(equation.primitive.name == "remat2" for equation in equations) == TEXT.layers
    expected, recomputed = gradient(params, tower), gradient(params, again)

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1.0, float(np.abs(x).max())))

    jax.tree.map(close, *jax.device_get((expected, recomputed)))


def test_bfloat16_computes_near_float32_with_float32_parameters(vision, see, text, read):
    tower, params, images = vision
    said, text_params, tokens, token_mask = text
    towers = ((tower, see, params, (images,)), (said, read, text_params, (tokens, token_mask)))
    for plain, run, weights, inputs in towers:
        half = plain.clone(dtype=jnp.bfloat16)
        made = jax.eval_shape(half.init, jax.random.key(0), *inputs)
        assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
        a, b = (f(weights, *inputs).embedding for f in (run, jax.jit(half.apply)))
        assert b.dtype == jnp.bfloat16
        a, b = np.asarray(a), np.asarray(b, np.float32)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.999  # 8 bits of mantissa through a block
        assert np.abs(a - b).max() > 0  # it did compute in bfloat16


def test_attention_with_everything_masked_is_finite():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    mask = jnp.array([[True, True, False, True, False], [False] * 5])[:, None, None, :]
    attention = Attention(heads=2)
    params = random_params(attention, x, mask)

    @jax.jit
    def run(x):
        def loss(x):
            out = attention.apply(params, x, mask)
            return jnp.sum(out**2), out

        return jax.value_and_grad(loss, has_aux=True)(x)

    (value, out), gradient = run(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    # A masked key has no influence at all.
    np.testing.assert_array_equal(run(x.at[0, 4].set(100.0))[0][1][0, :4], out[0, :4])


def test_wrong_sizes_and_names_are_refused():
    x = jnp.zeros((1, 3, 10))
    with pytest.raises(ValueError, match="the width 10 does not divide over 3 heads"):
        jax.eval_shape(Attention(heads=3).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: quick_gelu, gelu"):
        activation("swish")
    with pytest.raises(ValueError, match="swish"):
        jax.eval_shape(Transformer(1, heads=2, mlp_width=4, act="swish").init, jax.random.key(0), x)


@pytest.mark.parametrize("grid", [3, 7, 12])
def test_interpolated_positions_equal_pil_bicubic(grid):
    """PIL resizes float images with the same antialiased cubic (a = -0.5)."""
    table = np.random.default_rng(0).normal(size=(1 + 7 * 7, 5)).astype(np.float32)
    ours = interpolate_positions(table, grid)
    np.testing.assert_array_equal(ours[0], table[0])
    for channel in range(5):
        square = PIL.Image.fromarray(table[1:, channel].reshape(7, 7))
        expected = np.asarray(square.resize((grid, grid), PIL.Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours[1:, channel].reshape(grid, grid), expected, atol=1e-5)


def test_positions_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="a position table of 49 rows"):
        interpolate_positions(np.zeros((49, 4), np.float32), 7)


def test_parameter_names_suit_rules_by_name():
    """Sharding and weight decay are decided by these names."""
    tree = param_shapes(VISION, TEXT)
    paths = {
        "/".join(str(k.key) for k in path): leaf.ndim
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert "vision/transformer/block_0/attn/q/kernel" in paths
    for path, ndim in paths.items():
        parts = path.split("/")
        if parts[-1] == "scale":
            assert parts[-2] in ("ln_pre", "ln_post", "ln_1", "ln_2", "ln_final")
        if parts[-1] == "kernel":
            assert ndim >= 2
        known = ("kernel", "bias", "scale", "embedding", "class_embedding", "position_embedding")
        assert parts[-1] in (*known, "logit_scale"), path
