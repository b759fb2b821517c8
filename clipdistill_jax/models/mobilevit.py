"""MobileViTv2, a small vision tower of convolutions and separable self-attention.

Source: Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers" (2022);
sizes and block order as in timm models/mobilevit.py and apple/ml-cvnets mobilevit_v2.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from clipdistill_jax.models.convolution import ConvNorm, Pointwise
from clipdistill_jax.models.image import AnyArray, normalize, resize_to
from clipdistill_jax.models.outputs import VisionOutput

STAGE_CHANNELS = (64, 128, 256, 384, 512)
STEM_CHANNELS = 32
CONVOLUTION_BLOCKS = (1, 2)  # inverted residuals in stages 0 and 1
PATCH = 2  # attention runs over the positions of like parity: patches of 2x2 pixels


def _interpolation(size: int, target: int) -> np.ndarray:
    """[target, size] weights of linear interpolation with aligned corners (torch's align_corners=True)."""
    at = np.arange(target) * ((size - 1) / (target - 1))
    low = np.clip(np.floor(at).astype(int), 0, max(size - 2, 0))
    weights = np.zeros((target, size))
    weights[np.arange(target), low] += 1 - (at - low)
    weights[np.arange(target), np.minimum(low + 1, size - 1)] += at - low
    return weights


def enlarge_to_patches(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Bilinear resize with aligned corners up to the next even height and width; even maps are untouched."""
    for axis, equation in ((1, "th,nhwc->ntwc"), (2, "tw,nhwc->nhtc")):
        size = x.shape[axis]
        if size % PATCH:
            weights = jnp.asarray(_interpolation(size, size + PATCH - size % PATCH), x.dtype)
            x = jnp.einsum(equation, weights, x, precision=jax.lax.Precision.HIGHEST)
    return x


class InvertedResidual(nn.Module):
    """1x1 to twice the input's channels, depthwise 3x3, 1x1 without activation (MobileNetV2).

    The shortcut exists only where stride is 1 and the channels stay.
    """

    features: int
    stride: int
    depthwise: str = "conv"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 d"]:
        wide = 2 * x.shape[-1]
        y = ConvNorm(wide, "pointwise", dtype=self.dtype, name="expand")(x, train)
        y = ConvNorm(
            wide, "depthwise", self.stride, depthwise=self.depthwise, dtype=self.dtype, name="depthwise_conv"
        )(y, train)
        y = ConvNorm(self.features, "pointwise", activation=False, dtype=self.dtype, name="reduce")(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class SeparableAttention(nn.Module):
    """Separable self-attention, linear in the number of patches (equation 2 of the paper).

    Each of the 2x2 pixel positions of a patch attends over all patches: scores = softmax(q) over the
    patches, context = sum(k * scores), out = W(relu(v) * context).
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n h w d"]:
        n, h, w, d = x.shape
        qkv = Pointwise(1 + 2 * d, dtype=self.dtype, name="qkv")(x)
        # Splitting the axes leaves the positions of a patch in place, so nothing is transposed.
        qkv = qkv.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, 1 + 2 * d)
        query, key, value = jnp.split(qkv, (1, 1 + d), axis=-1)
        scores = jax.nn.softmax(query.astype(jnp.float32), axis=(1, 3))
        context = jnp.sum(key * scores, axis=(1, 3), keepdims=True).astype(self.dtype)
        out = (nn.relu(value) * context).reshape(n, h, w, d)
        return Pointwise(d, dtype=self.dtype, name="out")(out)


class AttentionLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms are over all positions and channels."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n h w d"]:
        d = x.shape[-1]
        y = nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=self.dtype, name="norm1")(x)
        x = x + SeparableAttention(dtype=self.dtype, name="attention")(y)
        y = nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=self.dtype, name="norm2")(x)
        y = Pointwise(2 * d, dtype=self.dtype, name="mlp_in")(y)
        return x + Pointwise(d, dtype=self.dtype, name="mlp_out")(nn.silu(y))


class MobileViTBlock(nn.Module):
    """Local depthwise 3x3, then attention layers over 2x2 patches, then back to the input's channels.

    No skip around it and no fusion convolution. An odd map is enlarged to an even one first and stays
    so: 7x7 in, 8x8 out (timm models/mobilevit.py, MobileVitV2Block).
    """

    width: int
    depth: int
    depthwise: str = "conv"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 c"]:
        channels = x.shape[-1]
        x = enlarge_to_patches(x)
        x = ConvNorm(channels, "depthwise", depthwise=self.depthwise, dtype=self.dtype, name="local")(
            x, train
        )
        x = Pointwise(self.width, use_bias=False, dtype=self.dtype, name="lift")(x)
        for i in range(self.depth):
            x = AttentionLayer(dtype=self.dtype, name=f"layer{i}")(x)
        x = nn.GroupNorm(num_groups=1, epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return ConvNorm(channels, "pointwise", activation=False, dtype=self.dtype, name="project")(x, train)


class MobileViTv2(nn.Module):
    """MobileViTv2 vision tower: a stem and five stages s0..s4, the last three with attention.

    Images are RGB. uint8 is divided by 255 here (`mean` and `std` as the public checkpoints want them);
    floats are taken as already normalised. Batch-norm state is the collection "batch_stats": apply with
    `train=True, mutable=["batch_stats"]` to use the batch's statistics and get the moved state back.

    Attributes:
      width: multiplies all channels; public sizes are 0.5, 0.75, ... 2.0.
      embed_dim: width of the joint space; a linear layer leads there from the pooled features. None leaves
        the pooled features themselves as the embedding.
      num_classes: adds the linear classifier that `classify` uses. None: no classifier.
      image_size: images of another size are resized to this square; None takes any size.
      channels: of the five stages, in place of `width` times (64, 128, 256, 384, 512).
      stem_channels: of the stem, in place of `width` times 32.
      attention_channels: of the last three stages, in place of half their channels.
      depths: attention layers in the last three stages.
      strides: of the stem and the five stages; a small input wants fewer twos.
      depthwise: "conv" or "shift", see `depthwise_3x3`.
      dtype: of the computation; parameters, statistics and softmax are float32.
      remat: recompute each block in the backward pass in place of keeping its activations.
    """

    width: float = 1.0
    embed_dim: int | None = 512
    num_classes: int | None = None
    image_size: int | None = None
    channels: tuple[int, ...] | None = None
    stem_channels: int | None = None
    attention_channels: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (2, 4, 3)
    strides: tuple[int, ...] = (2, 1, 2, 2, 2, 2)
    depthwise: str = "conv"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        channels = self.channels or tuple(int(c * self.width) for c in STAGE_CHANNELS)
        attention = self.attention_channels or tuple(c // 2 for c in channels[2:])
        for name, value, length in (
            ("channels", channels, 5),
            ("attention_channels", attention, 3),
            ("depths", self.depths, 3),
            ("strides", self.strides, 6),
        ):
            if len(value) != length:
                raise ValueError(f"MobileViTv2.{name} needs {length} numbers, got {tuple(value)}")
        if self.depthwise not in ("conv", "shift"):
            raise ValueError(f"MobileViTv2.depthwise must be 'conv' or 'shift', not {self.depthwise!r}")
        stem = self.stem_channels or int(STEM_CHANNELS * self.width)
        residual, attending = InvertedResidual, MobileViTBlock
        if self.remat:  # argument 2 is `train`, a Python bool
            residual = nn.remat(InvertedResidual, static_argnums=(2,))
            attending = nn.remat(MobileViTBlock, static_argnums=(2,))
        shared = {"depthwise": self.depthwise, "dtype": self.dtype}
        self.stem = ConvNorm(stem, "full", self.strides[0], dtype=self.dtype)
        stages = []
        for s, (features, stride) in enumerate(zip(channels, self.strides[1:], strict=True)):
            count = CONVOLUTION_BLOCKS[s] if s < len(CONVOLUTION_BLOCKS) else 1
            blocks: list[nn.Module] = [
                residual(features, stride if b == 0 else 1, **shared, name=f"stage{s}_block{b}")
                for b in range(count)
            ]
            if s >= len(CONVOLUTION_BLOCKS):
                i = s - len(CONVOLUTION_BLOCKS)
                blocks.append(attending(attention[i], self.depths[i], **shared, name=f"stage{s}_block1"))
            stages.append(tuple(blocks))
        self.stages = tuple(stages)
        if self.embed_dim is not None:
            self.embedding = nn.Dense(self.embed_dim, dtype=self.dtype)
        if self.num_classes is not None:
            self.classifier = nn.Dense(self.num_classes, dtype=self.dtype)

    def _features(
        self, images: Shaped[AnyArray, "n h w 3"], train: bool
    ) -> tuple[Float[Array, "n c"], tuple[Float[Array, "n _ _ _"], ...]]:
        """Pooled features of the last stage and the five stages' outputs."""
        x = jnp.asarray(images)
        if x.dtype == jnp.uint8:
            x = normalize(x, self.mean, self.std, self.dtype)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(self.dtype)
        else:
            raise ValueError(f"images must be uint8 (0 to 255) or float (already normalised), not {x.dtype}")
        if self.image_size is not None and x.shape[1:3] != (self.image_size, self.image_size):
            x = resize_to(x, self.image_size)
        x = self.stem(x, train)
        layers = []
        for blocks in self.stages:
            for block in blocks:
                x = block(x, train)
            layers.append(x)
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
        return pooled, tuple(layers)

    def __call__(self, images: Shaped[AnyArray, "n h w 3"], train: bool = False) -> VisionOutput:
        """Embedding [N, embed_dim] and the outputs [N, h, w, C] of stages s0..s4 of N images."""
        pooled, layers = self._features(images, train)
        if self.num_classes is not None and self.is_initializing():
            self.classifier(pooled)  # so that init through __call__ makes its parameters
        embedding = pooled if self.embed_dim is None else self.embedding(pooled)
        return VisionOutput(embedding=embedding, layers=layers)

    def classify(self, images: Shaped[AnyArray, "n h w 3"], train: bool = False) -> Float[Array, "n k"]:
        """Logits [N, num_classes] of N images.

        Raises:
          ValueError: the module was made without `num_classes`.
        """
        if self.num_classes is None:
            raise ValueError("MobileViTv2.classify needs num_classes, which is None")
        return self.classifier(self._features(images, train)[0])


def variable_shapes(model: MobileViTv2) -> dict[str, Any]:
    """Shapes of a tower's {"params", "batch_stats"}, as ShapeDtypeStructs; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return dict(jax.eval_shape(model.init, jax.random.key(0), image))
