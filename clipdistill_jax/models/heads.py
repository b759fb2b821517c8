"""Heads of the vision-language students: what they make of the last block's states.

All take states [..., C] and give float32. UNITER's: ChenRocks/UNITER model/vcr.py, vqa.py, ve.py and
pretrain.py; VL-BERT's: jackroos/VL-BERT vcr/modules, vqa/modules and common/visual_linguistic_bert.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clipdistill_jax.models.bert import INIT
from clipdistill_jax.models.layers import activation, layer_norm


def _out(outputs: int, init: nn.initializers.Initializer = INIT) -> nn.Dense:
    # In float32: scores rounded to bfloat16 would tie.
    return nn.Dense(outputs, dtype=jnp.float32, kernel_init=init, name="out")


class Linear(nn.Module):
    """Dropout, then a dense layer.

    On the pooled state: UNITER's and VL-BERT's image-text match (2, no dropout), and VL-BERT's choice score
    (1, dropout 0.1, Glorot's initialisation; its loss is a sigmoid's).
    """

    outputs: int
    dropout: float = 0.0
    glorot: bool = False

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"], train: bool = False) -> Float[Array, "*n o"]:
        states = nn.Dropout(self.dropout, deterministic=not train)(states)
        init = nn.initializers.glorot_uniform() if self.glorot else INIT
        return _out(self.outputs, init)(states)


class Classifier(nn.Module):
    """UNITER's on the pooled state: a dense layer to twice the width, activation, norm, a dense layer.

    VCR: 2 outputs (wrong, right) and "relu"; SNLI-VE (3) and VQA (3129): "gelu".
    """

    outputs: int
    act: str = "gelu"
    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"]) -> Float[Array, "*n o"]:
        x = nn.Dense(2 * states.shape[-1], dtype=self.dtype, kernel_init=INIT, name="dense")(states)
        x = jax.nn.relu(x) if self.act == "relu" else activation(self.act)(x)
        x = layer_norm(self.ln_eps, self.dtype, "ln")(x)
        return _out(self.outputs)(x)


class Transform(nn.Module):
    """A dense layer, GELU and, but for VL-BERT's region heads, a norm: [..., C] -> [..., C], in `dtype`."""

    norm: bool = True
    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        x = nn.Dense(states.shape[-1], dtype=self.dtype, kernel_init=INIT, name="dense")(states)
        x = activation("gelu")(x)
        return layer_norm(self.ln_eps, self.dtype, "ln")(x) if self.norm else x


class MaskedLanguage(nn.Module):
    """BERT's: transformed token states against the table of words, which is the embeddings' own."""

    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"], words: Float[Array, "v c"]) -> Float[Array, "*n v"]:
        x = Transform(True, self.ln_eps, self.dtype, name="transform")(states)
        bias = self.param("bias", nn.initializers.zeros, (len(words),), jnp.float32)
        words = words.astype(self.dtype)
        return jnp.einsum("...c,vc->...v", x, words, preferred_element_type=jnp.float32) + bias


class RegionRegression(nn.Module):
    """UNITER's MRFR: transformed region states back through the region features' own kernel, transposed."""

    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"], kernel: Float[Array, "f c"]) -> Float[Array, "*n f"]:
        x = Transform(True, self.ln_eps, self.dtype, name="transform")(states)
        bias = self.param("bias", nn.initializers.zeros, (len(kernel),), jnp.float32)
        kernel = kernel.astype(self.dtype)
        return jnp.einsum("...c,fc->...f", x, kernel, preferred_element_type=jnp.float32) + bias


class TransformedClasses(nn.Module):
    """`Transform`, dropout, a dense layer.

    Region classes: UNITER's MRC (norm), VL-BERT's MVRC and auxiliary object loss (no norm). VL-BERT's VQA
    answer from the state of [MASK] (norm, dropout 0.1, Glorot's initialisation).
    """

    outputs: int
    norm: bool = True
    dropout: float = 0.0
    glorot: bool = False
    ln_eps: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*n c"], train: bool = False) -> Float[Array, "*n o"]:
        x = Transform(self.norm, self.ln_eps, self.dtype, name="transform")(states)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        init = nn.initializers.glorot_uniform() if self.glorot else INIT
        return _out(self.outputs, init)(x)
