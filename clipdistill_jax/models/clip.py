"""CLIP's two towers, numerically equal to OpenAI's and to Hugging Face's.

Sources: openai/CLIP clip/model.py; huggingface/transformers models/clip/modeling_clip.py.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped

from clipdistill_jax.models.image import CLIP_MEAN, CLIP_STD, AnyArray, normalize, resize_to
from clipdistill_jax.models.layers import Transformer, layer_norm
from clipdistill_jax.models.outputs import TextOutput, VisionOutput


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a CLIP vision transformer (the defaults are ViT-B/32's).

    `mean` and `std` are those of the pixels in [0, 1] that the tower was trained on. `position_std` is the
    position table's at its start; None is CLIP's, width ** -0.5.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    projection_dim: int = 512
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    position_std: float | None = None

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a CLIP text transformer (the defaults are ViT-B/32's).

    The token ids are not used by the tower, which is told the tokens by `token_mask`; they are kept for
    the exported configuration.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    projection_dim: int = 512
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


_LARGE = ClipVisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096, projection_dim=768)
_LARGE_TEXT = ClipTextConfig(width=768, heads=12, mlp_width=3072, projection_dim=768)

PRESETS: dict[str, tuple[ClipVisionConfig, ClipTextConfig]] = {
    "ViT-B/32": (ClipVisionConfig(), ClipTextConfig()),
    "ViT-B/16": (ClipVisionConfig(patch_size=16), ClipTextConfig()),
    "ViT-L/14": (_LARGE, _LARGE_TEXT),
    "ViT-L/14@336": (dataclasses.replace(_LARGE, image_size=336), _LARGE_TEXT),
}


class ClipVision(nn.Module):
    """CLIP's vision transformer. remat: recompute blocks in the backward pass."""

    config: ClipVisionConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Shaped[AnyArray, "n h w 3"], train: bool = False) -> VisionOutput:
        """N images [N, H, W, 3]: uint8 RGB is normalised here, floats are taken as normalised already.

        Another size is resized (short side) and cropped (centre) to `config.image_size`. `train` changes
        nothing: the tower has no dropout.
        """
        c = self.config
        if images.shape[1:3] != (c.image_size, c.image_size):
            images = resize_to(images, c.image_size)
        if images.dtype == jnp.uint8:
            images = normalize(images, c.mean, c.std, self.dtype)
        elif not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be uint8 or float, not {images.dtype}")
        x = nn.Conv(
            c.width,
            (c.patch_size, c.patch_size),
            strides=(c.patch_size, c.patch_size),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            name="patch_embedding",
        )(images)
        n, h, w, _ = x.shape
        x = x.reshape(n, h * w, c.width)
        init = nn.initializers.normal(c.width**-0.5)
        first = self.param("class_embedding", init, (c.width,), jnp.float32).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (n, 1, c.width)), x], axis=1)
        positions = init if c.position_std is None else nn.initializers.normal(c.position_std)
        position = self.param("position_embedding", positions, (1 + c.grid**2, c.width), jnp.float32)
        x = layer_norm(c.ln_eps, self.dtype, "ln_pre")(x + position.astype(self.dtype))

        stack = Transformer(
            c.layers, c.heads, c.mlp_width, c.act, c.ln_eps, self.dtype, self.remat, name="transformer"
        )
        hidden = (x, *stack(x))
        pooled = layer_norm(c.ln_eps, self.dtype, "ln_post")(hidden[-1][:, 0])
        embedding = nn.Dense(
            c.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="projection"
        )(pooled)
        layers = tuple(y[:, 1:].reshape(n, h, w, c.width) for y in hidden[1:])
        return VisionOutput(embedding=embedding, layers=layers, hidden=hidden)


class ClipText(nn.Module):
    """CLIP's causal text transformer. remat: recompute blocks in the backward pass."""

    config: ClipTextConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "b t"],
        token_mask: Bool[AnyArray, "b t"],
        train: bool = False,
    ) -> TextOutput:
        """Token ids [B, T], T at most `config.context_length`; padding follows the end-of-text token.

        The end-of-text token is the last True of `token_mask`. Attention is causal and sees no padding
        mask, as in CLIP: states of padding are there but mean nothing.
        """
        c = self.config
        length = tokens.shape[1]
        if length > c.context_length:
            raise ValueError(f"{length} tokens a text, but the text tower has {c.context_length} positions")
        normal = nn.initializers.normal
        x = nn.Embed(
            c.vocab_size, c.width, dtype=self.dtype, embedding_init=normal(0.02), name="token_embedding"
        )(tokens)
        position = self.param("position_embedding", normal(0.01), (c.context_length, c.width), jnp.float32)
        x = x + position[:length].astype(self.dtype)

        stack = Transformer(
            c.layers, c.heads, c.mlp_width, c.act, c.ln_eps, self.dtype, self.remat, name="transformer"
        )
        hidden = (x, *stack(x, jnp.tril(jnp.ones((1, 1, length, length), bool))))
        states = nn.Dense(
            c.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=normal(c.width**-0.5),
            name="projection",
        )(layer_norm(c.ln_eps, self.dtype, "ln_final")(hidden[-1]))
        end = length - 1 - jnp.argmax(jnp.asarray(token_mask)[:, ::-1], axis=1)
        embedding = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return TextOutput(embedding=embedding, tokens=states, hidden=hidden)


def interpolate_positions(table: Float[AnyArray, "p c"], grid: int) -> Float[np.ndarray, "q c"]:
    """A vision position table [1 + n*n, C] made fit for `grid` patches a side: [1 + grid*grid, C].

    The class token's row stays; the others are resized as an image, bicubic (a = -0.5) and antialiased.
    torch's `interpolate` uses a = -0.75. Raises ValueError where the table is not a square grid and a
    class token.
    """
    table = np.asarray(table, np.float32)
    old = round((len(table) - 1) ** 0.5)
    if old * old != len(table) - 1:
        raise ValueError(f"a position table of {len(table)} rows is not a class token and a square grid")
    if old == grid:
        return table
    square = table[1:].reshape(old, old, -1)
    resized = jax.image.resize(square, (grid, grid, square.shape[-1]), method="bicubic", antialias=True)
    return np.concatenate([table[:1], np.asarray(resized).reshape(grid * grid, -1)])


def param_shapes(vision: ClipVisionConfig, text: ClipTextConfig) -> dict:
    """Shapes of {"vision", "text", "logit_scale"} without computing anything (a tree of ShapeDtypeStruct)."""
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    token_mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    return {
        "vision": jax.eval_shape(ClipVision(vision).init, key, image)["params"],
        "text": jax.eval_shape(ClipText(text).init, key, tokens, token_mask)["params"],
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
