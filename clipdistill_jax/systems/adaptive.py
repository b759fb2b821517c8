"""Adaptive finetuning: a student of questions reads a corrupted batch and learns UNITER's pretraining tasks.

Only the right choice of a question is read. CLIP-TD (eq. 11) distils naively beside it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import AnyArray, Batch
from clipdistill_jax.models.joint import JointFeatures, JointModel
from clipdistill_jax.systems.system import Config, Vocab
from clipdistill_jax.tasks import pretraining
from clipdistill_jax.tasks.masking import at_places

INPUTS = (  # what a student reads of a batch
    *("tokens", "token_mask", "types", "word_ids", "token_regions", "token_delta"),
    *("regions", "region_boxes", "region_mask", "image_size", "masked_regions", "region_delta"),
)
OF_A_CHOICE = (  # what has an axis of choices
    *("tokens", "token_mask", "types", "word_ids", "token_regions"),
    *("clip_tokens", "clip_token_mask", "clip_word_ids", "importance"),
    *("clip/text", "clip/words", "clip/word_mask"),
)
OF_AN_IMAGE = ("regions", "region_boxes", "region_mask", "image_size")
CONTRADICTION = 0  # of SNLI-VE's labels; VQA's are -1
HEADS = {"mlm": "mlm", "mrfr": "mrfr", "mrc": "mrc", "mrckl": "mrc", "itm": "itm"}  # of pretraining's tasks
# (params, batch, rng) -> the student's record, without heads
Encode = Callable[[Any, Batch, Any], JointFeatures]


@flax.struct.dataclass
class Pretrained(JointFeatures):
    """A student's record of a corrupted batch, and what pretraining makes of it.

    Attributes:
      outcome: see `tasks.pretraining.pretraining_loss`.
      distil: [B] bool, examples that see their own image.
    """

    outcome: AnyArray = None
    distil: AnyArray = None


def drawn(stage: Config) -> dict[str, Any]:
    """The tasks of a stage's pretraining and their ratios, without those of ratio 0."""
    return {task: ratio for task, ratio in stage["pretraining"]["ratios"].items() if ratio != 0}


def pretraining_settings(stage: Config, vocab: Vocab | None) -> pretraining.Pretraining:
    """What a stage's `pretraining` says. Raises ValueError for a field that is not there."""
    vocab = vocab or {"mask": 0, "random_low": 1, "random_high": 2}
    try:
        return pretraining.Pretraining(
            **{**stage["pretraining"], "ratios": drawn(stage)},
            mask_id=vocab["mask"],
            random_ids=(vocab["random_low"], vocab["random_high"]),
        )
    except TypeError as error:
        raise ValueError(f"pretraining: {error}") from error


def pretrain(
    module: JointModel,
    encode: Encode,
    settings: pretraining.Pretraining,
    params: Any,
    batch: Batch,
    rng: Any,
) -> Pretrained:
    """A student's record of a batch of which the drawn task hides something, and that task's loss."""
    batch = right_choice(batch)
    counts = batch["mask"] & batch["known"]
    hide, read_with, say = jax.random.split(rng, 3)
    first = {name: batch[name][:, 0] for name in ("tokens", "word_ids", "types")}
    corrupted = pretraining.corrupt(
        settings,
        hide,
        tokens=first["tokens"],
        word_ids=first["word_ids"],
        segments=first["types"],
        maskable_regions=batch["region_mask"].at[:, 0].set(False),  # region 0 is the whole image
        image_ids=batch["image_id"],
        mask=counts,
    )
    shown = {name: batch[name][corrupted.source] for name in OF_AN_IMAGE}
    read = {name: batch[name] for name in INPUTS if name in batch}
    read = {**read, **shown, "tokens": corrupted.tokens[:, None], "masked_regions": corrupted.regions}
    read["regions"] = without_hidden(read["regions"], read["region_mask"], corrupted.regions)
    # Tags would tell a text's own image from another, where they point at boxes that are not there.
    swaps = settings.hides(corrupted.task, pretraining.IMAGES)
    read["token_regions"] = jnp.where(swaps, 0, batch["token_regions"])
    if "masked_regions" in read and "mrfr" not in module.heads and "mrc" not in module.heads:
        del read["masked_regions"]  # nothing is hidden, and the student may have no vector to hide with
    features = encode(params, read, read_with)

    def head(name: str, features: JointFeatures = features, **given: Any) -> jax.Array:
        variables, rngs = {"params": params}, {"dropout": say}
        found: Any = module.apply(variables, name, features, given, True, method="head", rngs=rngs)
        return found[:, 0]

    def of_regions(name: str) -> Callable[[Any], jax.Array]:
        def run(places: Any) -> jax.Array:
            chosen = at_places(features.regions[:, 0], places)[:, None]
            return head(name, dataclasses.replace(features, regions=chosen))

        return run

    heads: dict[str, Callable[..., Any]] = {
        "mlm": lambda places: head("mlm", masked_tokens=places[:, None]),
        "itm": lambda: (
            head("itm"),
            *(features.tokens[:, 0], features.regions[:, 0]),
            *(features.token_mask[:, 0], features.region_mask),
        ),
        **{task: of_regions(HEADS[task]) for task in ("mrfr", "mrc", "mrckl")},
    }
    outcome = pretraining.pretraining_loss(
        settings,
        corrupted,
        {task: run for task, run in heads.items() if HEADS[task] in module.heads},
        tokens=first["tokens"],
        features=batch["regions"],
        class_probs=batch.get("class_probs"),
        mask=counts,
        fits=batch["fits"],
    )
    fields = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    return Pretrained(**fields, outcome=outcome, distil=counts & corrupted.matched)


def without_hidden(
    regions: Float[Array, "b n c"], mask: Bool[Array, "b n"], hidden: Bool[Array, "b n"]
) -> Float[Array, "b n c"]:
    """With the mean of the visible regions for the whole image's features, where regions are hidden.

    Most files have no features of the whole image, so that region 0 is the mean of all (`data.regions`):
    what is hidden could be read off it.
    """
    visible = (mask & ~hidden).at[:, 0].set(False)[..., None]
    mean = jnp.sum(jnp.where(visible, regions, 0.0), 1) / jnp.maximum(visible.sum(1), 1)
    return regions.at[:, 0].set(jnp.where(hidden.any(1, keepdims=True), mean, regions[:, 0]))


def right_choice(batch: Batch) -> Batch:
    """The batch with the right choice of each question alone; `known`, where there is one; and `fits`, where
    that text is true of the image or may be."""
    # A question with one text has nothing to choose from: SNLI-VE's label is none of its texts.
    several = batch["tokens"].shape[1] > 1
    label = batch["label"] if several else jnp.zeros_like(batch["label"])
    fits = jnp.ones_like(label, bool) if several else batch["label"] != CONTRADICTION
    place = jnp.maximum(label, 0)

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, place.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    picked = {name: pick(batch[name]) for name in OF_A_CHOICE if name in batch}
    return {**batch, **picked, "label": jnp.where(label >= 0, 0, -1), "known": label >= 0, "fits": fits}
