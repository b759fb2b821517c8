"""A BERT as the text tower of a dual encoder (CLIPPING's TinyBERT student)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from clipdistill_jax.models.bert import BertConfig, BertEmbeddings, BertEncoder
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.outputs import TextOutput


class BertText(nn.Module):
    """BERT without its pooler, and a linear projection to the joint space, shared by all tokens.

    Attributes:
      config: of the BERT.
      projection_dim: width of the joint space.
      remat: recompute blocks in the backward pass.
    """

    config: BertConfig
    projection_dim: int = 512
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "b t"],
        token_mask: Bool[AnyArray, "b t"],
        train: bool = False,
    ) -> TextOutput:
        """Token ids [B, T], T at most `config.context_length`; the first is [CLS], whose state is the text's.

        No token sees padding. `train` uses dropout, with the rng "dropout".
        """
        c = self.config
        x = BertEmbeddings(c, self.dtype, name="embeddings")(tokens, train=train)
        mask = jnp.asarray(token_mask)[:, None, None, :]
        hidden = BertEncoder(c, self.dtype, self.remat, name="encoder")(x, mask, train).hidden
        states = nn.Dense(
            self.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(c.width**-0.5),
            name="projection",
        )(hidden[-1])
        return TextOutput(embedding=states[:, 0], tokens=states, hidden=hidden)
