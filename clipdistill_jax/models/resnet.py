"""ResNet-50 and its like, version 1.5, with frozen batch norm: maps for region features.

Sources: He et al. 2015, Deep Residual Learning; pytorch/vision torchvision/models/resnet.py (version 1.5 has
the stride in a block's 3x3 convolution; Caffe's ResNets have it in the first 1x1 and are other networks).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from clipdistill_jax.models.convolution import BatchNorm, kernel_init
from clipdistill_jax.models.image import AnyArray, normalize

# pytorch/vision torchvision/transforms/_presets.py
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXPANSION = 4

# Blocks of the four stages.
PRESETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class ResNetOutput(NamedTuple):
    """The maps of the last two stages, and the logits over classes where the model has a head.

    c4 [N, H/16, W/16, 16 width], c5 [N, H/32, W/32, 32 width], logits [N, num_classes].
    """

    c4: Array
    c5: Array
    logits: Array | None


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, added to the input; the output is 4 `width` wide."""

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        out = EXPANSION * self.width
        y = nn.relu(_conv_norm(x, 1, self.width, 1, 1, self.dtype))
        y = nn.relu(_conv_norm(y, 2, self.width, 3, self.stride, self.dtype))
        y = _conv_norm(y, 3, out, 1, 1, self.dtype)
        if self.stride != 1 or x.shape[-1] != out:
            x = _conv(out, 1, self.stride, self.dtype, "downsample_conv")(x)
            x = BatchNorm(dtype=self.dtype, name="downsample_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Bottleneck ResNet; batch norm uses its running statistics always.

    Attributes:
      stages: blocks of the four stages (`PRESETS`).
      width: channels of the stem.
      num_classes: outputs of the linear head `fc`; None: there is none.
      mean, std: of the pixels in [0, 1] that it was trained on.
      dtype: compute dtype; parameters and statistics are float32.
    """

    stages: tuple[int, int, int, int] = PRESETS["resnet50"]
    width: int = 64
    num_classes: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Shaped[AnyArray, "n h w 3"]) -> ResNetOutput:
        """N images: uint8 RGB is normalised here, floats are taken as normalised already."""
        x = jnp.asarray(images)
        if x.dtype == jnp.uint8:
            x = normalize(x, self.mean, self.std, self.dtype)
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"images must be uint8 or float, not {x.dtype}")
        x = nn.relu(_conv_norm(x, 1, self.width, 7, 2, self.dtype))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        maps = []
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i and not j else 1
                x = Bottleneck(self.width * 2**i, stride, self.dtype, name=f"layer{i + 1}_{j}")(x)
            maps.append(x)
        logits = None
        if self.num_classes is not None:
            pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
            logits = nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(pooled)
        return ResNetOutput(maps[2], maps[3], logits)


def _conv(features: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        [(kernel // 2, kernel // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def _conv_norm(x: Array, k: int, features: int, kernel: int, stride: int, dtype: Any) -> Array:
    """conv{k} and bn{k} of the module that calls it."""
    return BatchNorm(dtype=dtype, name=f"bn{k}")(_conv(features, kernel, stride, dtype, f"conv{k}")(x))


def variable_shapes(model: ResNet) -> dict[str, Any]:
    """Shapes of {"params", "batch_stats"}, as ShapeDtypeStructs; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return dict(jax.eval_shape(model.init, jax.random.key(0), image))
