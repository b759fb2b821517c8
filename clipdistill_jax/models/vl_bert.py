"""VL-BERT, fed with region features.

Sources: Su et al., ICLR 2020; jackroos/VL-BERT common/visual_linguistic_bert.py, common/fast_rcnn.py (as far
as it works on precomputed features), vcr/modules and vqa/modules. Numerically theirs; the sequence is laid
out in blocks (see `models.joint`): tokens, objects, [END].

Object 0 is the whole image. Texts: VCR [CLS] question [SEP] answer [SEP], segments 0 and 1; VQA [CLS]
question [SEP] [MASK] [SEP], answered from the state of [MASK]. VL-BERT has no SNLI-VE: that head is ours, the
choice head with three outputs.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.bert import LARGE, BertConfig, BertEmbeddings, BertEncoder, BertPooler
from clipdistill_jax.models.features import Batch
from clipdistill_jax.models.heads import Linear, MaskedLanguage, TransformedClasses
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.joint import (
    INPUTS,
    LABELS,
    JointFeatures,
    JointModel,
    check_heads,
    each_choice,
    fold,
    relative,
    to_predict,
)

OBJECT_TYPE = 2  # the segment of objects and [END]
WAVE_BASE = 1000.0
ONLY = np.zeros(1, np.int32)  # the index of a table's only row


@dataclasses.dataclass(frozen=True)
class VlBertConfig(BertConfig):
    """Sizes of a VL-BERT (the defaults are VL-BERT-base's: bert-base-uncased and bottom-up features).

    Attributes:
      feature_width: C of the region features.
      waves: frequencies of the geometry embedding, which is 8 * waves wide.
      answers: of the "vqa" head.
      region_classes: of the "mrc" head, background included.
      object_classes: of the "objects" head, VCR's auxiliary loss, background included.
      feature_dropout: of geometry and features, before they are brought to the model's width.
      head_dropout: of the heads that answer.
    """

    types: int = 3
    feature_width: int = 2048
    waves: int = 256
    answers: int = 3129
    region_classes: int = 1601
    object_classes: int = 81
    feature_dropout: float = 0.1
    head_dropout: float = 0.1


PRESETS: dict[str, VlBertConfig] = {
    "base": VlBertConfig(),
    "large": VlBertConfig(**LARGE),
}


def geometry(
    boxes: Float[AnyArray, "b n 4"], size: Float[AnyArray, "b 2"], waves: int
) -> Float[Array, "b n d"]:
    """Sines, then cosines, of cx, cy, w, h in hundredths of the image: [B, N, 8 waves], float32.

    Wave k divides by 1000^(k / waves) (common/utils/bbox.py:33-65).
    """
    corners, extent = relative(boxes, size)
    position = 100 * jnp.concatenate([(corners[..., :2] + corners[..., 2:]) / 2, extent], -1)
    angle = position[..., None] / WAVE_BASE ** (jnp.arange(waves, dtype=jnp.float32) / waves)
    embedded = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    return embedded.reshape(*position.shape[:-1], 8 * waves)


class ObjectVectors(nn.Module):
    """Geometry and features to the model's width: dropout, a dense layer, ReLU (`obj_downsample`)."""

    config: VlBertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, regions: Float[Array, "b n f"], places: Float[Array, "b n d"], train: bool = False
    ) -> Float[Array, "b n c"]:
        x = jnp.concatenate([places.astype(self.dtype), regions.astype(self.dtype)], -1)
        x = nn.Dropout(self.config.feature_dropout, deterministic=not train)(x)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's, for a dense layer
        return nn.relu(nn.Dense(self.config.width, dtype=self.dtype, kernel_init=init, name="dense")(x))


class VlBert(JointModel):
    """VL-BERT with its heads; the fields are those of `JointModel`.

    At most one of "vcr" (one number a choice), "ve" and "vqa"; "objects", classes of the objects' states, for
    VCR's auxiliary loss; any of pretraining's "mlm", "mrc" and "itm".
    """

    config: VlBertConfig
    known: ClassVar = ("vcr", "ve", "vqa", "objects", "mlm", "mrc", "itm")
    inputs: ClassVar = (*INPUTS, "token_regions")

    def setup(self):
        check_heads(type(self).__name__, self.heads, self.known)
        c, eps, dtype = self.config, self.config.ln_eps, self.dtype

        def vector(width: int, init: nn.initializers.Initializer = c.init) -> nn.Embed:
            return nn.Embed(1, width, dtype=dtype, embedding_init=init)

        def visual_norm() -> nn.LayerNorm:
            """Starts at 0, so that training starts at BERT."""
            zeros = nn.initializers.zeros
            return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, scale_init=zeros)

        self.embeddings = BertEmbeddings(c, dtype)
        self.object_vectors = ObjectVectors(c, dtype)
        self.ln_text, self.ln_object = visual_norm(), visual_norm()
        self.object_embedding, self.end_embedding = vector(c.width), vector(c.width)
        if "mrc" in self.heads:
            self.mask_feature = vector(c.feature_width, nn.initializers.zeros)
            self.mask_object = vector(c.width)
        self.encoder = BertEncoder(c, dtype, self.remat)
        self.pooler = BertPooler(dtype)
        answers = {"dropout": c.head_dropout, "glorot": True}
        kinds = {
            "vcr": lambda: Linear(1, **answers),
            "ve": lambda: Linear(LABELS, **answers),
            "vqa": lambda: TransformedClasses(c.answers, ln_eps=eps, dtype=dtype, **answers),
            "objects": lambda: TransformedClasses(c.object_classes, norm=False, dtype=dtype),
            "mlm": lambda: MaskedLanguage(eps, dtype),
            "mrc": lambda: TransformedClasses(c.region_classes, norm=False, dtype=dtype),
            "itm": lambda: Linear(2),
        }
        for name in self.heads:
            setattr(self, name, kinds[name]())

    def embed(self, batch: Batch, train: bool = False) -> tuple[Float[Array, "n s c"], Bool[Array, "n s"]]:
        """Embeddings of the B K sequences, T tokens, N objects and [END], and which of them are real.

        A token's is word + LN(vector of its object, or of object 0), an object's "[IMG]" + LN(its vector);
        then position and segment. Beside a text of n tokens all objects have position n, and [END] has n + 1
        (common/visual_linguistic_bert.py:173-240).
        """
        b, k, t = jnp.shape(batch["tokens"])
        if "token_delta" in batch or "region_delta" in batch:
            raise ValueError("VL-BERT takes no token_delta or region_delta: adversarial training is UNITER's")
        c, e = self.config, self.embeddings
        if t + 2 > c.context_length:
            raise ValueError(
                f"{t} tokens a text, but VL-BERT has {c.context_length} positions, objects and [END] included"
            )
        regions, spoken = self._hidden(batch)
        places = geometry(batch["region_boxes"], batch["image_size"], c.waves)
        vectors = self.object_vectors(regions, places, train)

        seen = each_choice(self.ln_text(vectors), k)
        seen = jnp.take_along_axis(seen, fold(batch["token_regions"])[..., None], axis=1)
        text = e.token_embedding(fold(batch["tokens"])) + seen
        text = text + e.position_embedding(jnp.arange(t)) + e.type_embedding(fold(batch["types"]))

        token_mask = fold(batch["token_mask"])
        length = token_mask.sum(1, keepdims=True, dtype=jnp.int32)
        objects = each_choice(self.ln_object(vectors) + spoken, k)
        end = jnp.broadcast_to(self.end_embedding(ONLY), (b * k, 1, c.width))
        image = jnp.concatenate(
            [objects + e.position_embedding(length), end + e.position_embedding(length + 1)], 1
        )
        image = image + e.type_embedding(jnp.asarray(OBJECT_TYPE))
        mask = [token_mask, each_choice(batch["region_mask"], k), jnp.ones((b * k, 1), bool)]
        return e.finish(jnp.concatenate([text, image], axis=1), train), jnp.concatenate(mask, axis=1)

    def _hidden(self, batch: Batch) -> tuple[Float[Array, "b n f"], Float[Array, "..."]]:
        """Region features, and the objects' "[IMG]", with the mask's vectors where regions are hidden."""
        regions, spoken = jnp.asarray(batch["regions"]).astype(self.dtype), self.object_embedding(ONLY)
        if "mrc" not in self.heads:
            if "masked_regions" in batch:
                raise ValueError("masked_regions: only a VL-BERT with the head 'mrc' can hide regions")
            return regions, spoken
        feature, word = self.mask_feature(ONLY), self.mask_object(ONLY)  # also at init: they are made here
        if "masked_regions" in batch:
            masked = jnp.asarray(batch["masked_regions"])[..., None]
            regions, spoken = jnp.where(masked, feature, regions), jnp.where(masked, word, spoken)
        return regions, spoken

    def say(
        self, name: str, features: JointFeatures, pooled: Float[Array, "b k c"], batch: Batch, train: bool
    ) -> Float[Array, "..."]:
        """What a head says."""
        head = getattr(self, name)
        if name == "mlm":
            return head(to_predict(features.tokens, batch), self.embeddings.token_embedding.embedding)
        if name == "vqa":  # [MASK] is the last but one of the real tokens
            place = features.token_mask.sum(-1, dtype=jnp.int32)[..., None, None] - 2
            pooled = jnp.take_along_axis(features.tokens, jnp.maximum(place, 0), axis=2)[:, :, 0]
        return head(features.regions if name in ("objects", "mrc") else pooled, train)
