"""What the models that read text and regions in one sequence (UNITER, VL-BERT) share: batch and record.

Their `Batch` has B examples, K texts (choices) an example, T tokens, N regions an image:
  tokens        [B, K, T] int    token ids, real tokens first; the first is [CLS]
  token_mask    [B, K, T] bool   True where a token is real
  types         [B, K, T] int    segment of each token
  word_ids      [B, K, T] int    word of each token; -1 on special tokens and padding
  regions       [B, N, C] float  region features as the detector gives them; region 0 is the whole image
  region_boxes  [B, N, 4] float  x1, y1, x2, y2 in the frame of image_size
  region_mask   [B, N] bool      True where a region is real
  image_size    [B, 2] float     width and height; (1, 1) where boxes are fractions
Where asked for by a head or a model:
  token_regions  [B, K, T] int   region that a token speaks of, 0 for none (VL-BERT)
  masked_regions [B, N] bool     regions whose features are hidden from the model
  masked_tokens  [B, K, M] int   positions that the masked-language head predicts; without it, all T
  token_delta    [B, K, T, D], region_delta [B, K, N, C]  what an adversary adds (UNITER)
Every text of an example sees the same image. The sequence is the text's block, then the regions' block:
attention has no order but that of the embeddings, so gaps between the blocks change nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from clipdistill_jax.models.bert import BertConfig, EncoderOutput
from clipdistill_jax.models.dual_encoder import mean_by_word
from clipdistill_jax.models.features import AnyArray, Batch, Features

INPUTS = (
    *("tokens", "token_mask", "types", "word_ids"),
    *("regions", "region_boxes", "region_mask", "image_size"),
)
ANSWERS = ("vcr", "ve", "vqa")  # heads whose output is the model's answer
LABELS = 3  # of SNLI-VE


@flax.struct.dataclass
class JointFeatures(Features):
    """`Features` of a model with one sequence, and what its heads say.

    `image`, `text`, `tokens` and `words` are states of the last block, of width D, and differ between the
    texts of an example: image [B, K, D] (region 0), text [B, K, D] ([CLS]), tokens [B, K, T, D], words
    [B, K, T, D]. `attention` is [B, K, layers, heads, S, S] over the sequence: T tokens, N regions and, in
    VL-BERT, [END]. `logits` is [B, K] for "vcr" and [B, classes] for "ve" and "vqa".

    Attributes:
      regions: [B, K, N, D] states of the regions.
      region_mask: [B, N] bool, True where a region is real.
      outputs: float32, by head: "vcr" [B, K, 2] (wrong, right) or [B, K, 1], "ve" and "vqa" [B, 1, classes],
        "itm" [B, K, 2] (no match, match), "mlm" [B, K, M, vocabulary], "mrfr" [B, K, N, C] features, "mrc"
        and "objects" [B, K, N, classes].
    """

    regions: AnyArray = None
    region_mask: AnyArray = None
    outputs: Any = None


def check_heads(model: str, heads: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError for a head that is not known, or two that both answer."""
    unknown = [name for name in heads if name not in known]
    if unknown:
        raise ValueError(f"{model}: there is no head {unknown[0]!r}; there is {', '.join(known) or 'none'}")
    answering = [name for name in heads if name in ANSWERS]
    if len(answering) > 1:
        raise ValueError(f"{model} gives one answer, but has the heads {' and '.join(answering)}")


def fold(x: Shaped[AnyArray, "b k *rest"]) -> Shaped[Array, "n *rest"]:
    """[B, K, ...] as B K rows."""
    x = jnp.asarray(x)
    return x.reshape(-1, *x.shape[2:])


def each_choice(x: Shaped[AnyArray, "b *rest"], choices: int) -> Shaped[Array, "n *rest"]:
    """An image's rows once a text: [B, ...] -> [B K, ...]."""
    return jnp.repeat(jnp.asarray(x), choices, axis=0)


def joint_features(out: EncoderOutput, batch: Batch) -> JointFeatures:
    """The record of an encoder's output, without the heads' part.

    Args:
      out: of B K sequences: T tokens, N regions and maybe more.
      batch: as above.
    """
    b, k, t = jnp.shape(batch["tokens"])
    n = jnp.shape(batch["region_mask"])[1]
    states = out.hidden[-1]
    states = states.reshape(b, k, *states.shape[1:])
    tokens = states[:, :, :t]
    words, word_mask = mean_by_word(tokens, jnp.asarray(batch["word_ids"]))
    attention = None
    if out.attention:
        attention = jnp.stack(out.attention, axis=1)
        attention = attention.reshape(b, k, *attention.shape[1:])
    return JointFeatures(
        image=states[:, :, t],
        text=tokens[:, :, 0],
        tokens=tokens,
        token_mask=jnp.asarray(batch["token_mask"]),
        words=words,
        word_mask=word_mask,
        attention=attention,
        regions=states[:, :, t : t + n],
        region_mask=jnp.asarray(batch["region_mask"]),
    )


def to_predict(tokens: Shaped[Array, "b k t c"], batch: Batch) -> Shaped[Array, "b k m c"]:
    """The token states that a masked-language head reads: those of `masked_tokens`, or all."""
    if "masked_tokens" not in batch:
        return tokens
    return jnp.take_along_axis(tokens, jnp.asarray(batch["masked_tokens"])[..., None], axis=2)


def answer(outputs: Mapping[str, Array]) -> Array | None:
    """`logits` of the head that answers, if there is one.

    VCR's choices are ranked by the last number alone: UNITER's logit of "right" (model/vcr.py:74), VL-BERT's
    only one.

    Raises:
      ValueError: SNLI-VE or VQA with more than one text an example.
    """
    for name in ANSWERS:
        if name in outputs and name == "vcr":
            return outputs[name][..., -1]
        if name in outputs:
            if outputs[name].shape[1] != 1:
                raise ValueError(f"{name} has one text an example, not {outputs[name].shape[1]}")
            return outputs[name][:, 0]
    return None


class JointModel(nn.Module):
    """What `Uniter` and `VlBert` have in common: from a batch to its record.

    Attributes:
      config: sizes.
      heads: names of the heads that there are; at most one of `ANSWERS`.
      dtype: compute dtype; parameters, norms' statistics, softmax and the heads' outputs are float32.
      remat: recompute each block in the backward pass.

    A subclass has `known` heads, reads `inputs` of the batch, and sets up `encoder`, `pooler` and each head.
    """

    config: BertConfig
    heads: tuple[str, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    known: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = INPUTS

    def embed(self, batch: Batch, train: bool = False) -> tuple[Float[Array, "n s c"], Bool[Array, "n s"]]:
        """Embeddings of the B K sequences, tokens then regions, and which of them are real."""
        raise NotImplementedError

    def say(
        self, name: str, features: JointFeatures, pooled: Float[Array, "b k c"], batch: Batch, train: bool
    ) -> Float[Array, "..."]:
        """What a head says."""
        raise NotImplementedError

    def __call__(
        self,
        batch: Batch,
        train: bool = False,
        attention: bool = False,
        heads: Sequence[str] | None = None,
    ) -> JointFeatures:
        """The record of a batch.

        Args:
          batch: as this module says.
          train: use dropout; needs the rng "dropout" where a rate is not 0.
          attention: give the attention weights too.
          heads: which of the model's to run; None is all.

        Raises:
          ValueError: an input or a head is missing, the texts are too long, or several where one is answered.
        """
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            who, reads = type(self).__name__, ", ".join(self.inputs)
            raise ValueError(f"{who} reads {reads}; the batch has no {', '.join(missing)}")
        x, mask = self.embed(batch, train)
        out = self.encoder(x, mask[:, None, None], train, attention)
        features = joint_features(out, batch)
        pooled = self.pooler(out.hidden[-1]).reshape(features.text.shape)
        names = self.heads if heads is None else tuple(heads)
        check_heads(type(self).__name__, names, self.heads)
        outputs = {name: self.say(name, features, pooled, batch, train) for name in names}
        return dataclasses.replace(features, outputs=outputs, logits=answer(outputs))

    def head(self, name: str, features: JointFeatures, batch: Batch, train: bool = False) -> Array:
        """What one head says of a record that was made without it; `batch` may have `masked_tokens`."""
        pooled = self.pooler(fold(features.text)[:, None]).reshape(features.text.shape)
        return self.say(name, features, pooled, batch, train)

    def complete(self, batch: Batch) -> JointFeatures:
        """All heads: touches every parameter, so it is what `init` runs."""
        return self(batch)


def example_batch(width: int, size: int = 1, choices: int = 1, tokens: int = 4, regions: int = 2) -> Batch:
    """A batch of zeros with every input and every mask True; `width` is that of the region features."""
    text = (size, choices, tokens)
    return {
        "tokens": jnp.zeros(text, jnp.int32),
        "token_mask": jnp.ones(text, bool),
        "types": jnp.zeros(text, jnp.int32),
        "word_ids": jnp.zeros(text, jnp.int32),
        "token_regions": jnp.zeros(text, jnp.int32),
        "regions": jnp.zeros((size, regions, width)),
        "region_boxes": jnp.zeros((size, regions, 4)),
        "region_mask": jnp.ones((size, regions), bool),
        "image_size": jnp.ones((size, 2)),
    }


def relative(boxes: Shaped[AnyArray, "b n 4"], size: Shaped[AnyArray, "b 2"]) -> tuple[Array, Array]:
    """Corners (x1, y1, x2, y2) and extents (w, h) in fractions of the image, float32: [B, N, 4], [B, N, 2].

    A size of 0, as padded examples have, counts as 1.
    """
    size = jnp.asarray(size, jnp.float32)
    size = jnp.where(size > 0, size, 1.0)[:, None]
    corners = jnp.asarray(boxes, jnp.float32) / jnp.concatenate([size, size], -1)
    return corners, corners[..., 2:] - corners[..., :2]


def param_shapes(model: Any) -> dict:
    """Shapes of a model's parameters without computing anything (ShapeDtypeStructs)."""
    batch = example_batch(model.config.feature_width)
    return jax.eval_shape(lambda key: model.init(key, batch, method="complete"), jax.random.key(0))["params"]
