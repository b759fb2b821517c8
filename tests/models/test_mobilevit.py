"""Sizes and parts of MobileViTv2; its numerical parity as a whole is in tests/convert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.convolution import BatchNorm, depthwise_3x3, pointwise
from clipdistill_jax.models.mobilevit import (
    MobileViTv2,
    SeparableAttention,
    enlarge_to_patches,
    variable_shapes,
)

TINY = MobileViTv2(
    stem_channels=8,
    channels=(8, 8, 16, 16, 24),
    attention_channels=(8, 8, 16),
    depths=(1, 0, 0),  # what more layers give is compared with transformers'
    embed_dim=12,
    strides=(1, 1, 2, 2, 2, 2),
    depthwise="shift",
)


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def look(model: MobileViTv2):
    """`model.apply` with a plain tuple out, which jax.eval_shape can describe under the run-time checks."""

    def apply(variables, pixels):
        out = model.apply(variables, pixels)
        return out.embedding, out.layers

    return apply


def images(size: int, batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(3), (batch, size, size, 3), 0, 256).astype(jnp.uint8)


@pytest.fixture(scope="module")
def tiny():
    """Variables made here (an initialisation compiles longer than the model), of which none is a plain 0."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        x = rng.normal(size=x.shape) * (0.1 if x.ndim < 2 else np.prod(x.shape[:-1]) ** -0.5)
        return np.asarray(x + (path[-1].key in ("scale", "var")), np.float32)

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(TINY))


# timm 1.0.9, counted there: with the 1000-class head, and without a head.
@pytest.mark.parametrize(
    "width, total, backbone",
    [
        (0.5, 1_370_593, 1_113_593),
        (0.75, 2_866_009, 2_481_009),
        (1.0, 4_901_841, 4_388_841),
        (1.25, 7_478_089, 6_837_089),
        (1.5, 10_594_753, 9_825_753),
        (1.75, 14_251_833, 13_354_833),
        (2.0, 18_449_329, 17_424_329),
    ],
)
def test_parameter_counts(width, total, backbone):
    shapes = variable_shapes(MobileViTv2(width, embed_dim=None, num_classes=1000))
    assert count(shapes["params"]) == total
    shapes["params"].pop("classifier")
    assert count(shapes["params"]) == backbone


def test_parameters_by_part_and_maps_by_stage_at_width_1():
    model = MobileViTv2(1.0)
    variables = variable_shapes(model)
    parts = {"stem": 0, "stage0": 0, "stage1": 0, "stage2": 0, "stage3": 0, "stage4": 0, "embedding": 0}
    for name, tree in variables["params"].items():
        parts[name.split("_")[0]] += count(tree)
    expected = [928, 7_104, 95_616, 403_458, 1_528_580, 2_353_155, 512 * 512 + 512]
    assert list(parts.values()) == expected
    assert sum(expected[:-1]) == 4_388_841  # timm's, as above

    channels = (64, 128, 256, 384, 512)
    for size, grids in {224: (112, 56, 28, 14, 8), 256: (128, 64, 32, 16, 8)}.items():  # 7 is odd: 8
        pixels = jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8)
        embedding, layers = jax.eval_shape(look(model), variables, pixels)
        assert [x.shape for x in layers] == [(2, g, g, c) for g, c in zip(grids, channels, strict=True)]
        assert embedding.shape == (2, 512)


def test_images_of_another_size_are_resized(tiny):
    _, layers = jax.eval_shape(look(TINY.clone(image_size=32)), tiny, images(48))
    assert layers[0].shape == (2, 32, 32, 8)


def test_uint8_is_the_float_image_between_0_and_1(tiny):
    pixels = images(32)
    first = jax.jit(lambda variables, x: TINY.apply(variables, x).layers[0])  # one stage alone is compiled
    real = first(tiny, np.asarray(pixels, np.float32) / 255)
    np.testing.assert_allclose(first(tiny, pixels), real, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride, size", [(1, 7), (2, 7), (2, 8)])
def test_depthwise_shift_is_the_grouped_convolution_with_its_gradients(stride, size):
    rng = np.random.default_rng(0)
    half = -(-size // stride), -(-(size + 2) // stride)
    x, kernel, g = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, size, size + 2, 6), (3, 3, 1, 6), (2, *half, 6))
    )

    @jax.jit
    def run(x, kernel, g):
        both = [
            jax.vjp(lambda x, k, how=how: depthwise_3x3(x, k, stride, how), x, kernel)
            for how in ("conv", "shift")
        ]
        return [(y, *gradient(g)) for y, gradient in both]

    for theirs, ours, atol in zip(*run(x, kernel, g), (1e-5, 2e-5, 2e-5), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol)


def test_stride_2_pads_both_sides_as_torch():
    torch = pytest.importorskip("torch", reason="parity with torch's convolution")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 3, 1, 4)).astype(np.float32)
    theirs = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)),
        torch.tensor(kernel.transpose(3, 2, 0, 1)),
        stride=2,
        padding=1,
        groups=4,
    )
    for how in ("conv", "shift"):
        ours = depthwise_3x3(jnp.asarray(x), jnp.asarray(kernel), 2, how)
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_pointwise_is_a_1x1_convolution():
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 7, 6), (6, 4)))
    conv = jax.lax.conv_general_dilated(
        x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(jax.jit(pointwise)(x, kernel), conv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h, w", [(1, 3), (13, 8)])
def test_resize_is_torch_bilinear_with_aligned_corners(h, w):
    torch = pytest.importorskip("torch", reason="parity with torch's interpolation")
    x = np.random.default_rng(0).normal(size=(2, h, w, 5)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x.transpose(0, 3, 1, 2)), (h + h % 2, w + w % 2), mode="bilinear", align_corners=True
    )
    ours = jax.jit(enlarge_to_patches)(x)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_attention_mixes_only_positions_of_like_parity():
    attention = SeparableAttention()

    @jax.jit
    def change(key):
        x = jax.random.normal(key, (1, 4, 6, 8))
        before, variables = attention.init_with_output(key, x)
        return attention.apply(variables, x.at[0, 2, 3].add(1.0)) - before

    moved = np.abs(np.asarray(change(jax.random.key(0))[0])).max(-1) > 1e-6
    assert moved[0::2, 1::2].all()  # row even, column odd, like (2, 3)
    moved[0::2, 1::2] = False
    assert not moved.any()


def test_batch_norm_moves_as_torch():
    torch = pytest.importorskip("torch", reason="parity with torch.nn.BatchNorm2d")
    rng = np.random.default_rng(0)
    theirs = torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(rng.normal(size=5)))
        theirs.bias.copy_(torch.tensor(rng.normal(size=5)))
    ours = BatchNorm()
    params = {
        "scale": jnp.asarray(theirs.weight.detach().numpy()),
        "bias": jnp.asarray(theirs.bias.detach().numpy()),
    }
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    train = jax.jit(lambda variables, x: ours.apply(variables, x, True, mutable=["batch_stats"]))
    for _ in range(3):
        # 2 x 2 x 3 = 12 values a channel: Bessel's correction is 9 %.
        x = rng.normal(1.0, 2.0, size=(2, 2, 3, 5)).astype(np.float32)
        out, state = train({"params": params, "batch_stats": stats}, x)
        stats = state["batch_stats"]
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats["mean"], theirs.running_mean.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], theirs.running_var.numpy(), rtol=1e-5, atol=1e-6)
    out = jax.jit(ours.apply)({"params": params, "batch_stats": stats}, x)
    theirs.eval()
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_batch_statistics_are_global_under_a_sharded_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).normal(size=(16, 2, 2, 3)) * np.arange(1, 17)[:, None, None, None]
    x, norm = x.astype(np.float32), BatchNorm()
    variables = jax.jit(norm.init)(jax.random.key(0), x)
    apply = jax.jit(lambda v, x: norm.apply(v, x, True, mutable=["batch_stats"]))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        apply(variables, sharded),
        apply(variables, x),
    )


def loss_of(model, variables, pixels):
    """params -> loss, and the moved statistics."""

    def loss(params):
        out, state = model.apply({**variables, "params": params}, pixels, True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(out.embedding.astype(jnp.float32))), state

    return loss


def loss_and_gradient(model, variables, pixels):
    return jax.jit(jax.value_and_grad(loss_of(model, variables, pixels), has_aux=True))(variables["params"])


@pytest.fixture(scope="module")
def trained(tiny):
    return jax.device_get(loss_and_gradient(TINY, tiny, images(32, 4)))


def test_training_moves_every_statistic_and_reaches_every_parameter(tiny, trained):
    (_, state), gradient = trained
    unmoved = jax.tree.map(lambda a, b: bool(np.all(a == b)), state["batch_stats"], tiny["batch_stats"])
    assert not any(jax.tree.leaves(unmoved))
    still = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(gradient)
        if np.max(np.abs(x)) == 0
    ]
    assert not still


def test_remat_and_conv_change_nothing(tiny, trained):
    (loss, state), gradient = trained
    other = TINY.clone(remat=True, depthwise="conv")
    (loss2, state2), gradient2 = jax.device_get(loss_and_gradient(other, tiny, images(32, 4)))
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    # Float32 sums in another order, through gradients of norms over 16 values: 1e-4 of the largest entry.
    for a, b in zip(jax.tree.leaves((state, gradient)), jax.tree.leaves((state2, gradient2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * float(np.max(np.abs(a)) + 1e-3))


def test_bfloat16_runs_near_float32_with_float32_state(tiny, trained):
    model = TINY.clone(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variable_shapes(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(look(model), tiny, images(32))[0].dtype == jnp.bfloat16
    loss = loss_of(model, tiny, images(32, 4))
    found, state = jax.jit(loss)(tiny["params"])
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    (exact, _), _ = trained
    np.testing.assert_allclose(found, exact, rtol=0.05)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channels": (8, 8)}, "channels needs 5 numbers"),
        ({"strides": (1, 1, 2, 2, 2)}, "strides needs 6 numbers"),
        ({"depths": (1,)}, "depths needs 3 numbers"),
        ({"depthwise": "fast"}, "depthwise must be 'conv' or 'shift', not 'fast'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        variable_shapes(TINY.clone(**fields))


def test_wrong_images_and_a_missing_classifier_are_refused(tiny):
    with pytest.raises(ValueError, match="uint8 .* or float"):
        jax.eval_shape(TINY.apply, tiny, jnp.zeros((1, 32, 32, 3), jnp.int32))
    with pytest.raises(ValueError, match="num_classes"):
        TINY.apply(tiny, images(32), method="classify")
