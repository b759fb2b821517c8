"""CLIP4Clip's temporal heads: mean pooling, LSTM, transformer, and the pairwise ("tight") transformer.

Source: ArrowLuo/CLIP4Clip modules/modeling.py (heads), modules/module_cross.py (blocks). Their layer
norms have epsilon 1e-12, unlike CLIP's 1e-5.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.layers import Transformer, layer_norm, quick_gelu


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / |x| along the last axis, in float32. Vectors shorter than 1e-12 give 0, with gradient 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    safe = square > 1e-24
    return jnp.where(safe, x * jax.lax.rsqrt(jnp.where(safe, square, 1.0)), 0.0)


def pool(temporal: Float[Array, "b f d"], frame_mask: Bool[Array, "b f"]) -> Float[Array, "b d"]:
    """Clip vectors of unit length: each frame to unit length, the mean of the real frames, to unit length.

    A clip without a real frame gives zeros, with gradient 0. Computed in float32.
    Source: CLIP4Clip modules/modeling.py:333-343, 392-394.
    """
    weights = frame_mask.astype(jnp.float32)[..., None]
    total = jnp.sum(unit(temporal) * weights, axis=-2)
    return unit(total / jnp.maximum(jnp.sum(weights, axis=-2), 1.0))


def _heads(width: int, heads: int | None) -> int:
    """The number of heads asked for, or CLIP's: one for every 64 channels, at least one."""
    return heads or max(1, width // 64)


def _positions(table: Float[AnyArray, "p d"], length: int, what: str) -> Float[AnyArray, "l d"]:
    if length > len(table):
        raise ValueError(f"{length} {what}, but the head has {len(table)} positions: raise `positions`")
    return table[:length]


class MeanPool(nn.Module):
    """meanP: the frames as they are; `pool` does the rest. No parameters."""

    @nn.compact
    def __call__(
        self, frames: Float[Array, "b f d"], frame_mask: Bool[Array, "b f"], train: bool = False
    ) -> Float[Array, "b f d"]:
        """Frame vectors [B, F, D], unchanged."""
        return frames


class SeqLSTM(nn.Module):
    """seqLSTM: a one-way LSTM over the real frames, plus the frames themselves.

    The real frames are the first `sum(frame_mask)` ones, as for a packed sequence. After them the LSTM's
    output is replaced by the frame itself, so the result there is twice the frame. (CLIP4Clip does so
    behind the longest clip of a batch and writes zeros before it; no masked position is ever read.)
    Source: CLIP4Clip modules/modeling.py:360-369.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Float[Array, "b f d"], frame_mask: Bool[Array, "b f"], train: bool = False
    ) -> Float[Array, "b f d"]:
        """Frame vectors [B, F, D] -> [B, F, D]."""
        width = frames.shape[-1]
        bound = width**-0.5  # torch's initialisation of an LSTM

        def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        cell = nn.OptimizedLSTMCell(
            width, kernel_init=uniform, recurrent_kernel_init=uniform, dtype=self.dtype, name="lstm"
        )
        states = jnp.asarray(nn.RNN(cell)(frames.astype(self.dtype)))
        real = jnp.arange(frames.shape[1]) < frame_mask.sum(-1, keepdims=True)
        return jnp.where(real[..., None], states, frames) + frames


class SeqTransf(nn.Module):
    """seqTransf: frame positions and pre-norm blocks over the real frames, plus the frames themselves.

    There is no final norm. Source: CLIP4Clip modules/modeling.py:370-384.

    Attributes:
      layers: number of blocks.
      heads: attention heads; None: one for every 64 channels.
      positions: rows of the frame position table (77 in CLIP4Clip, from CLIP's text tower).
      position_std: of the table at its start. Frame vectors of a tower that starts from scratch are about 1 a
        channel; positions much smaller than that leave the order of frames unseen for long.
      remat: recompute the blocks in the backward pass.
    """

    layers: int = 4
    heads: int | None = None
    positions: int = 77
    position_std: float = 0.02
    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, frames: Float[Array, "b f d"], frame_mask: Bool[Array, "b f"], train: bool = False
    ) -> Float[Array, "b f d"]:
        """Frame vectors [B, F, D] -> [B, F, D]; masked frames get a value too, and influence no other."""
        width = frames.shape[-1]
        table = self.param(
            "position_embedding",
            nn.initializers.normal(self.position_std),
            (self.positions, width),
            jnp.float32,
        )
        frames = frames.astype(self.dtype)
        x = frames + _positions(table, frames.shape[1], "frames a clip").astype(self.dtype)
        heads = _heads(width, self.heads)
        stack = Transformer(
            self.layers,
            heads,
            4 * width,
            "quick_gelu",
            self.ln_eps,
            self.dtype,
            self.remat,
            name="transformer",
        )
        # CLIP4Clip adds -1e6 to the scores of masked frames: their weights are exactly 0, as here.
        return stack(x, frame_mask[:, None, None, :])[-1] + frames


class TightTransf(nn.Module):
    """tightTransf: every (text, clip) pair goes through a transformer together; see `scores`.

    Source: CLIP4Clip modules/modeling.py:320-331, 403-444; modules/module_cross.py:132-223.

    Attributes:
      width: channels D of text and frame vectors.
      layers, heads, positions, ln_eps, remat: as in `SeqTransf`; the text takes the first position.
      dropout: rate on the embedded sequence while training (rng "dropout").
      pairs: pairs scored at a time; bounds the memory.
    """

    width: int = 512
    layers: int = 4
    heads: int | None = None
    positions: int = 77
    ln_eps: float = 1e-12
    dropout: float = 0.1
    pairs: int = 1024
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.position_embedding = self.param(
            "position_embedding", normal, (self.positions, self.width), jnp.float32
        )
        self.transformer = Transformer(
            self.layers,
            _heads(self.width, self.heads),
            4 * self.width,
            "quick_gelu",
            self.ln_eps,
            self.dtype,
            self.remat,
        )
        self.ln_pool = layer_norm(self.ln_eps, self.dtype)
        self.pooler = nn.Dense(self.width, dtype=self.dtype, kernel_init=normal)
        self.similarity = nn.Dense(1, dtype=self.dtype, kernel_init=normal)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, frames: Float[Array, "b f d"], frame_mask: Bool[Array, "b f"], train: bool = False
    ) -> Float[Array, "b f d"]:
        """The frames unchanged: without a text this head has nothing to say."""
        return frames

    def scores(
        self,
        texts: Float[Array, "t d"],
        frames: Float[Array, "v f d"],
        frame_mask: Bool[Array, "v f"],
        train: bool = False,
    ) -> Float[Array, "t v"]:
        """Scores of every text [T, D] against every clip [V, F, D], in float32, without a logit scale.

        Pairs are scored `pairs` at a time in a loop; with `remat` the backward pass is bounded as well.
        """
        count = len(texts) * len(frames)
        chunk = min(self.pairs, count)
        # The last chunk is filled up with the first pair.
        index = jnp.arange(-(-count // chunk) * chunk)
        index = jnp.where(index < count, index, 0).reshape(-1, chunk)

        def body(module: "TightTransf", carry: None, pair: Int[Array, " p"]) -> tuple[None, Array]:
            text, clip = pair // len(frames), pair % len(frames)
            return carry, module._score(texts[text], frames[clip], frame_mask[clip], train)

        if self.remat:
            body = nn.remat(body, prevent_cse=False)
        rngs: dict[Any, bool] = {"params": False, "dropout": True}
        _, scores = nn.scan(body, variable_broadcast="params", split_rngs=rngs)(self, None, index)
        return scores.reshape(-1)[:count].reshape(len(texts), len(frames))

    def _score(
        self,
        text: Float[Array, "p d"],
        frames: Float[Array, "p f d"],
        frame_mask: Bool[Array, "p f"],
        train: bool,
    ) -> Float[Array, " p"]:
        """Score of each of P (text, clip) pairs."""
        x = jnp.concatenate([text[:, None], frames], axis=1).astype(self.dtype)
        mask = jnp.concatenate([jnp.ones_like(frame_mask[:, :1]), frame_mask], axis=1)
        table = _positions(self.position_embedding, x.shape[1], "frames and text")
        x = self.drop(x + table.astype(self.dtype), deterministic=not train)
        x = self.transformer(x, mask[:, None, None, :])[-1]
        x = quick_gelu(self.pooler(self.ln_pool(x[:, 0])))
        return self.similarity(x)[:, 0].astype(jnp.float32)


def init_from_text(text_params: Mapping[str, Any], temporal_params: Mapping[str, Any]) -> dict[str, Any]:
    """A head's parameters with its blocks and positions taken from a CLIP text tower.

    Block i of the head becomes block i of the text transformer, the frame positions the text positions
    (the first rows, where the head has fewer). What a head does not have is left out: mean pooling and
    the LSTM come back as they were. Source: CLIP4Clip modules/modeling.py:78-121.

    Raises:
      ValueError: the head has more blocks or positions than the text tower, or another width.
    """
    made = dict(temporal_params)
    if "transformer" in made:
        blocks, text_blocks = made["transformer"], text_params["transformer"]
        if not set(blocks) <= set(text_blocks):
            raise ValueError(
                f"the head has {len(blocks)} blocks, the text tower only {len(text_blocks)}: "
                "give the head no more layers than the text tower has"
            )
        made["transformer"] = {name: text_blocks[name] for name in blocks}
        if jax.tree.map(np.shape, made["transformer"]) != jax.tree.map(np.shape, dict(blocks)):
            raise ValueError("the head's blocks have another width than the text tower's")
    if "position_embedding" in made:
        table, wanted = text_params["position_embedding"], np.shape(made["position_embedding"])
        if table.shape[0] < wanted[0] or table.shape[1] != wanted[1]:
            raise ValueError(
                f"the head's position table {wanted} cannot be taken from the text tower's {table.shape}"
            )
        made["position_embedding"] = table[: wanted[0]]
    return made
