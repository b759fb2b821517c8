"""The BERT encoder of the project's BERT-like models, numerically equal to Hugging Face's.

Embeddings, encoder and pooler are apart, so that a model with other inputs (regions of an image) keeps the
encoder. Sources: Devlin et al. 2019; huggingface/transformers models/bert/modeling_bert.py.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.layers import Mlp, layer_norm

INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT (the defaults are bert-base-uncased's).

    Attributes:
      types: rows of the token type (segment) table.
      dropout: of the embeddings and of both branches of a block.
      attention_dropout: of the attention weights.
      initializer_range: standard deviation of the tables and kernels at the start. BERT's suits a width of
        768; a model of 96 that starts so small learns nothing from its regions for hundreds of steps, and
        wants about 1 / sqrt(width).
    """

    vocab_size: int = 30522
    context_length: int = 512
    types: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    act: str = "gelu"
    ln_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02

    @property
    def init(self) -> nn.initializers.Initializer:
        """How tables and kernels start."""
        return nn.initializers.normal(self.initializer_range)


LARGE: dict[str, Any] = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096}
PRESETS: dict[str, BertConfig] = {
    # huawei-noah/TinyBERT_General_4L_312D config.json.
    "tiny_4x312": BertConfig(width=312, layers=4, heads=12, mlp_width=1200),
    "base": BertConfig(),
    "large": BertConfig(**LARGE),
}


@flax.struct.dataclass
class EncoderOutput:
    """What the encoder makes of B sequences.

    Attributes:
      hidden: [B, T, C] states: the input, then every block's output.
      attention: [B, heads, T, T] weights of every block (query, key), before dropout; empty if not asked for.
    """

    hidden: tuple[Any, ...]
    attention: tuple[Any, ...] = ()


class BertEmbeddings(nn.Module):
    """LN(token + position + type), then dropout.

    Attributes of the bound module, for models that add up something else: the tables `token_embedding`,
    `position_embedding` and `type_embedding` (ids -> [..., C]), and `finish`.
    """

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config

        def table(rows: int) -> nn.Embed:
            return nn.Embed(rows, c.width, dtype=self.dtype, embedding_init=c.init)

        self.token_embedding = table(c.vocab_size)
        self.position_embedding = table(c.context_length)
        self.type_embedding = table(c.types)
        self.ln = layer_norm(c.ln_eps, self.dtype)
        self.drop = nn.Dropout(c.dropout)

    def __call__(
        self,
        tokens: Int[AnyArray, "b t"],
        types: Int[AnyArray, "b t"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b t c"]:
        """Embeds ids [B, T] at positions 0, 1, ...; types None is type 0 everywhere.

        Raises:
          ValueError: there are more tokens than positions.
        """
        length, positions = tokens.shape[1], self.config.context_length
        if length > positions:
            raise ValueError(f"{length} tokens a text, but BERT has {positions} positions")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(length))
        return self.finish(x + self.type_embedding(jnp.zeros_like(tokens) if types is None else types), train)

    def finish(self, x: Float[Array, "b t c"], train: bool = False) -> Float[Array, "b t c"]:
        """The norm and the dropout of a sum of embeddings."""
        return self.drop(self.ln(x), deterministic=not train)


class BertAttention(nn.Module):
    """Multi-head self-attention that also returns its weights; the softmax is in float32."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], mask: Bool[Array, "#b 1 #t t"] | None, train: bool
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b h t t"]]:
        """x [B, T, C]; mask True where a query (axis 2) may look at a key (axis 3)."""
        c = self.config
        width = x.shape[-1]
        if width % c.heads:
            raise ValueError(f"the width {width} does not divide over {c.heads} heads")

        def project(name: str) -> jax.Array:
            y = nn.Dense(width, dtype=self.dtype, kernel_init=c.init, name=name)(x)
            return y.reshape(*x.shape[:2], c.heads, -1)

        q, k, v = (project(name) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = scores * (width // c.heads) ** -0.5
        if mask is not None:
            # Finite: a query that may look at nothing gets the plain mean of the values, never NaN.
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores)
        kept = nn.Dropout(c.attention_dropout)(weights.astype(self.dtype), deterministic=not train)
        out = jnp.einsum("bhqk,bkhd->bqhd", kept, v).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, kernel_init=c.init, name="o")(out), weights


class BertBlock(nn.Module):
    """A post-norm block: ln_1(x + attn(x)), then ln_2(x + mlp(x)), with dropout on both branches."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], mask: Bool[Array, "#b 1 #t t"] | None, train: bool
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b h t t"]]:
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not train)
        y, weights = BertAttention(c, self.dtype, name="attn")(x, mask, train)
        x = layer_norm(c.ln_eps, self.dtype, "ln_1")(x + drop(y))
        std = c.initializer_range
        y = Mlp(c.mlp_width, c.act, in_std=std, out_std=std, dtype=self.dtype, name="mlp")(x)
        return layer_norm(c.ln_eps, self.dtype, "ln_2")(x + drop(y)), weights


class BertEncoder(nn.Module):
    """A stack of post-norm blocks block_0, block_1, ...

    Attributes:
      config: all but the tables' sizes; the width is the input's.
      dtype: compute dtype; parameters, norms' statistics and softmax are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    config: BertConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t c"],
        mask: Bool[Array, "#b 1 #t t"] | None = None,
        train: bool = False,
        attention: bool = False,
    ) -> EncoderOutput:
        """States and, with `attention`, weights of embeddings [B, T, C].

        Args:
          x: embeddings.
          mask: True where a query (axis 2) may look at a key (axis 3): `token_mask[:, None, None]`.
          train: use dropout; needs the rng "dropout" where a rate is not 0.
          attention: return the attention weights too.
        """
        block = nn.remat(BertBlock, static_argnums=(3,)) if self.remat else BertBlock
        hidden, weights = [x], []
        for i in range(self.config.layers):
            x, seen = block(self.config, self.dtype, name=f"block_{i}")(x, mask, train)
            hidden.append(x)
            weights.append(seen)
        return EncoderOutput(tuple(hidden), tuple(weights) if attention else ())


class BertPooler(nn.Module):
    """tanh of a dense layer on the first token's state: [B, T, C] -> [B, C]."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "b t c"]) -> Float[Array, "b c"]:
        dense = nn.Dense(states.shape[-1], dtype=self.dtype, kernel_init=INIT, name="dense")
        return jnp.tanh(dense(states[:, 0]))


def param_shapes(config: BertConfig, pooler: bool = True) -> dict:
    """Shapes of {"embeddings", "encoder", "pooler"} without computing anything (ShapeDtypeStructs)."""
    key = jax.random.key(0)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    states = jax.ShapeDtypeStruct((1, 1, config.width), jnp.float32)
    made = {
        "embeddings": jax.eval_shape(BertEmbeddings(config).init, key, tokens),
        "encoder": jax.eval_shape(BertEncoder(config).init, key, states),
    }
    if pooler:
        made["pooler"] = jax.eval_shape(BertPooler().init, key, states)
    return {name: variables["params"] for name, variables in made.items()}
