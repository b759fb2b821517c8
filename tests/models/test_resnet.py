"""Sizes and input of ResNets; their numerical parity with torch is in tests/convert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD, PRESETS, ResNet, variable_shapes


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


# torchvision's documentation of resnet50 and resnet101; without the head, 2048 * 1000 + 1000 fewer.
@pytest.mark.parametrize(
    ("name", "num_classes", "expected", "statistics"),
    [
        ("resnet50", 1000, 25_557_032, 53_120),
        ("resnet50", None, 23_508_032, 53_120),
        ("resnet101", 1000, 44_549_160, 105_344),
    ],
)
def test_parameter_counts(name, num_classes, expected, statistics):
    shapes = variable_shapes(ResNet(stages=PRESETS[name], num_classes=num_classes))
    assert count(shapes["params"]) == expected
    assert count(shapes["batch_stats"]) == statistics


def test_maps_and_normalisation():
    model = ResNet(stages=(1, 1, 1, 1), width=8, num_classes=5)
    images = jax.random.randint(jax.random.key(0), (2, 64, 96, 3), 0, 256).astype(jnp.uint8)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    apply = jax.jit(model.apply)
    out = apply(variables, images)
    assert out.c4.shape == (2, 4, 6, 128) and out.c5.shape == (2, 2, 3, 256) and out.logits.shape == (2, 5)
    floats = ((np.asarray(images) / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    np.testing.assert_allclose(apply(variables, floats).c5, out.c5, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="uint8 or float"):
        model.apply(variables, images.astype(jnp.int32))
