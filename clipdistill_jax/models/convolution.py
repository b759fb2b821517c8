"""Convolutions with batch norm, written so that they are also fast on CPU."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# cvnets initialises every convolution with He's normal over the fan-out. A depthwise filter feeds
# 9 outputs, which is what "fan_in" counts for a [3, 3, 1, C] kernel.
_TAPS = tuple((i, j) for i in range(3) for j in range(3))
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def _shifted(x: Array, kernel: Array, stride: int) -> Array:
    """Depthwise 3x3 as a sum of nine shifted copies, each times one of the filter's nine weights."""
    h, w = (-(-size // stride) for size in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [
        padded[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
        * kernel[i, j, 0]
        for i, j in _TAPS
    ]
    return functools.reduce(jnp.add, terms)


def _shift_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _shift_backward(stride: int, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = kept
    (dx,) = jax.vjp(lambda x: _shifted(x, kernel, stride), x)[1](g)
    n, h, w, c = g.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    window = (n, stride * (h - 1) + 1, stride * (w - 1) + 1, c)

    def tap(at: Array) -> Array:
        shifted = jax.lax.dynamic_slice(padded, (0, at[0], at[1], 0), window)[:, ::stride, ::stride]
        return jnp.sum(shifted * g, axis=(0, 1, 2), dtype=jnp.float32)

    # A loop, not nine expressions: XLA's CPU backend keeps nine shifted copies of x in memory otherwise,
    # which takes twice the time.
    dkernel = jax.lax.map(tap, jnp.array(_TAPS)).reshape(3, 3, 1, c)
    return dx, dkernel.astype(kernel.dtype)


_shift = jax.custom_vjp(_shifted, nondiff_argnums=(2,))
_shift.defvjp(_shift_forward, _shift_backward)


def depthwise_3x3(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 1 c"], stride: int, how: str
) -> Float[Array, "n h2 w2 c"]:
    """Depthwise 3x3 convolution, zero padding 1 on every side (torch's, also at stride 2).

    Args:
      x: [N, h, w, C] feature map.
      kernel: [3, 3, 1, C] one filter a channel.
      stride: step between outputs; the output grid is ceil(h / stride) x ceil(w / stride).
      how: "conv" is one grouped convolution, the choice for GPU and TPU. "shift" is a sum of nine shifted
        and scaled copies: the same numbers, and on CPU, where XLA's grouped convolution is slow backwards,
        5 to 30 times faster.

    Raises:
      ValueError: `how` is neither.
    """
    if how == "shift":
        return _shift(x, kernel, stride)
    if how != "conv":
        raise ValueError(f"depthwise must be 'conv' or 'shift', not {how!r}")
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with torch's state update.

    With `train` the statistics are the batch's (over the global batch under jit, however it is
    sharded) and the running ones move: running = 0.9 running + 0.1 batch, the variance entering with
    Bessel's correction n / (n - 1) as in torch.nn.BatchNorm2d (flax.linen.BatchNorm has none).
    Statistics are float32. State: collection "batch_stats", `mean` [C] and `var` [C].
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"], train: bool = False) -> Float[Array, "*n c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axes)
            var = jnp.maximum(jnp.mean(jnp.square(x), axes) - jnp.square(mean), 0.0)
            if not self.is_initializing():
                count = x.size // channels
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * jax.lax.rsqrt(var + self.epsilon)
        return (x * gain + (bias - mean * gain)).astype(self.dtype)


def pointwise(x: Float[Array, "*n c"], kernel: Float[Array, "c d"]) -> Float[Array, "*n d"]:
    """A 1x1 convolution: all positions are the rows of one matrix product.

    On CPU, XLA is 2 to 4 times slower backwards where the positions stay several axes (as in
    flax.linen.Dense), and slower still with a 1x1 convolution.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Pointwise(nn.Module):
    """A linear layer on the channels of every position."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
        x = pointwise(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x + bias.astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, and SiLU if `activation`.

    kind: "full" (3x3), "depthwise" (3x3) or "pointwise" (1x1).
    """

    features: int
    kind: str
    stride: int = 1
    activation: bool = True
    depthwise: str = "conv"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 d"]:
        if self.kind == "depthwise":
            kernel = self.param("kernel", depthwise_init, (3, 3, 1, self.features), jnp.float32)
            x = depthwise_3x3(x, kernel.astype(self.dtype), self.stride, self.depthwise)
        elif self.kind == "pointwise":
            kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
            x = pointwise(x, kernel.astype(self.dtype))
        else:
            kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
            x = jax.lax.conv_general_dilated(
                x,
                kernel.astype(self.dtype),
                (self.stride, self.stride),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
        return nn.silu(x) if self.activation else x
