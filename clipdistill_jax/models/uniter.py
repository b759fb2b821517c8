"""UNITER, and VILLA, which is UNITER trained against an adversary.

Sources: Chen et al., ECCV 2020, and ChenRocks/UNITER model/model.py; Gan et al., NeurIPS 2020, and
zhegan27/VILLA model/model.py. Numerically theirs; the sequence is laid out in blocks (see `models.joint`).

Left to the caller: UNITER has no token for the whole image. For distillation its region 0 is the whole image,
which is ours; with the original's regions alone, `image` is the state of the first of them.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.bert import LARGE, BertConfig, BertEmbeddings, BertEncoder, BertPooler
from clipdistill_jax.models.features import Batch
from clipdistill_jax.models.heads import (
    Classifier,
    Linear,
    MaskedLanguage,
    RegionRegression,
    TransformedClasses,
)
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.joint import (
    LABELS,
    JointFeatures,
    JointModel,
    check_heads,
    each_choice,
    fold,
    relative,
    to_predict,
)
from clipdistill_jax.models.layers import layer_norm

REGION_TYPE = 1
VCR_WORDS, VCR_TYPES = 28996 + 81, 4  # with person_0 to person_80; question, region, answer, rationale


@dataclasses.dataclass(frozen=True)
class UniterConfig(BertConfig):
    """Sizes of a UNITER (the defaults are UNITER-base's: bert-base-cased and bottom-up features).

    For VCR vocab_size is `VCR_WORDS` and types is `VCR_TYPES`.

    Attributes:
      feature_width: C of the region features.
      answers: of the "vqa" head.
      region_classes: of the "mrc" head, background included.
    """

    vocab_size: int = 28996
    feature_width: int = 2048
    answers: int = 3129
    region_classes: int = 1601


PRESETS: dict[str, UniterConfig] = {
    "base": UniterConfig(),
    "large": UniterConfig(**LARGE),
}


def locations(boxes: Float[AnyArray, "b n 4"], size: Float[AnyArray, "b 2"]) -> Float[Array, "b n 7"]:
    """x1/W, y1/H, x2/W, y2/H, w/W, h/H and the share of the area (UNITER data/data.py:248-252)."""
    corners, extent = relative(boxes, size)
    return jnp.concatenate([corners, extent, extent[..., :1] * extent[..., 1:]], -1)


class RegionEmbeddings(nn.Module):
    """LN(LN(dense(features)) + LN(dense(locations)) + type), without the dropout (model/model.py:248-319)."""

    config: UniterConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        self.features = nn.Dense(c.width, dtype=self.dtype, kernel_init=c.init)
        self.locations = nn.Dense(c.width, dtype=self.dtype, kernel_init=c.init)
        self.ln_features, self.ln_locations = (layer_norm(c.ln_eps, jnp.float32) for _ in range(2))
        self.ln = layer_norm(c.ln_eps, self.dtype)
        # Row 0, of regions that are not hidden, is 0 in UNITER; it is kept for its checkpoints and not read.
        self.mask_embedding = nn.Embed(2, c.feature_width, dtype=self.dtype, embedding_init=c.init)

    def __call__(
        self,
        regions: Float[Array, "n r f"],
        locations: Float[Array, "n r 7"],
        types: Float[Array, " c"],
        masked: Bool[Array, "n r"] | None = None,
        delta: Float[Array, "m r f"] | None = None,
    ) -> Float[Array, "m r c"]:
        """Embeddings of N images' R regions, in float32 but for the products and the last norm's output.

        Args:
          regions: raw features; those of hidden regions are not read.
          locations: as `locations` gives them.
          types: the vector of the region type.
          masked: True where a region is hidden behind the mask's vector.
          delta: added to the raw features, hidden or not (VILLA), M / N for each image; else M is N.
        """
        x = regions.astype(self.dtype)
        hidden = self.mask_embedding(jnp.ones((), jnp.int32))  # also at init, so that it is made
        if masked is not None:
            x = jnp.where(masked[..., None], hidden, x)
        x, places = self.features(x), self.ln_locations(self.locations(locations))
        if delta is not None:
            # By itself, for in bfloat16 noise as small as VILLA's would be rounded off the features.
            noise = jnp.einsum(
                "nrf,fc->nrc",
                delta.astype(self.dtype),
                self.kernel().astype(self.dtype),
                preferred_element_type=jnp.float32,
            )
            copies = len(delta) // len(regions)
            x, places = each_choice(x, copies) + noise, each_choice(places, copies)
        return self.ln(self.ln_features(x) + places + types)

    def kernel(self) -> Float[Array, "f c"]:
        """The kernel on the features, once they have been embedded."""
        return self.features.variables["params"]["kernel"]


class Uniter(JointModel):
    """UNITER with its heads; the fields are those of `JointModel`.

    At most one of "vcr" (two numbers a choice: wrong, right), "ve" and "vqa"; any of pretraining's "mlm",
    "mrfr", "mrc" and "itm".
    """

    config: UniterConfig
    known: ClassVar = ("vcr", "ve", "vqa", "mlm", "mrfr", "mrc", "itm")

    def setup(self):
        check_heads(type(self).__name__, self.heads, self.known)
        c, eps, dtype = self.config, self.config.ln_eps, self.dtype
        self.embeddings = BertEmbeddings(c, dtype)
        self.region_embeddings = RegionEmbeddings(c, dtype)
        self.region_drop = nn.Dropout(c.dropout)
        self.encoder = BertEncoder(c, dtype, self.remat)
        self.pooler = BertPooler(dtype)
        kinds = {
            "vcr": lambda: Classifier(2, "relu", eps, dtype),
            "ve": lambda: Classifier(LABELS, "gelu", eps, dtype),
            "vqa": lambda: Classifier(c.answers, "gelu", eps, dtype),
            "mlm": lambda: MaskedLanguage(eps, dtype),
            "mrfr": lambda: RegionRegression(eps, dtype),
            "mrc": lambda: TransformedClasses(c.region_classes, ln_eps=eps, dtype=dtype),
            "itm": lambda: Linear(2),
        }
        for name in self.heads:
            setattr(self, name, kinds[name]())

    def embed(self, batch: Batch, train: bool = False) -> tuple[Float[Array, "n s c"], Bool[Array, "n s"]]:
        """Embeddings of the B K sequences, T tokens and N regions, and which of them are real."""
        choices, t = jnp.shape(batch["tokens"])[1:]
        if t > self.config.context_length:
            raise ValueError(f"{t} tokens a text, but UNITER has {self.config.context_length} positions")
        e = self.embeddings
        text = e.token_embedding(fold(batch["tokens"]))
        if "token_delta" in batch:  # added in float32, as the regions' is
            text = text + fold(batch["token_delta"])
        text = text + e.position_embedding(jnp.arange(t)) + e.type_embedding(fold(batch["types"]))

        delta, masked = batch.get("region_delta"), batch.get("masked_regions")
        image = self.region_embeddings(
            jnp.asarray(batch["regions"]),
            locations(batch["region_boxes"], batch["image_size"]),
            e.type_embedding(jnp.asarray(REGION_TYPE)),
            None if masked is None else jnp.asarray(masked),
            None if delta is None else fold(delta),
        )
        if delta is None:  # with noise, the texts of an example no longer see one image
            image = each_choice(image, choices)
        image = self.region_drop(image, deterministic=not train)
        mask = jnp.concatenate(
            [fold(batch["token_mask"]), each_choice(batch["region_mask"], choices)], axis=1
        )
        return jnp.concatenate([e.finish(text, train), image], axis=1), mask

    def say(
        self, name: str, features: JointFeatures, pooled: Float[Array, "b k c"], batch: Batch, train: bool
    ) -> Float[Array, "..."]:
        """What a head says."""
        head = getattr(self, name)
        if name == "mlm":
            return head(to_predict(features.tokens, batch), self.embeddings.token_embedding.embedding)
        if name == "mrfr":
            return head(features.regions, self.region_embeddings.kernel())
        return head(features.regions if name == "mrc" else pooled)
