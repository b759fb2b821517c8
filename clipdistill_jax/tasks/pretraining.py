"""UNITER's pretraining tasks: L_pretraining of CLIP-TD's adaptive finetuning, equation 11.

One task is drawn a step, and with it what it hides. Losses take plain arrays and give a value an example;
logits and features are [B, M, ...] at M places of a row, of which those `chosen` [B, M] are predicted; M may
be the whole row. Sources: Chen et al. 2020, "UNITER", section 3; ChenRocks/UNITER model/pretrain.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from clipdistill_jax.tasks.masking import at_places, mask_regions, mask_words, mismatch_images, places_of
from clipdistill_jax.tasks.transport import transport_distance

WORDS, REGIONS, IMAGES = "words", "regions", "images"
HIDES = {"mlm": WORDS, "mrfr": REGIONS, "mrc": REGIONS, "mrckl": REGIONS, "itm": IMAGES}
AVERAGES = ("places", "examples")
KL_MEANS = ("classes", "places")
Counted = tuple[Float[Array, " b"], Bool[Array, " b"]]  # values, and which examples they count for
Outcome = tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Counted]]


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What is drawn, and how it is averaged.

    Attributes:
      ratios: task -> how often it is drawn, relative to the others. UNITER's second stage on VCR has
        {"mlm": 2, "mrfr": 1, "mrckl": 1} (large: 10, 1, 1), its in-domain pretraining
        {"itm": 2, "mlm": 2, "mrfr": 1, "mrckl": 1}.
      mask_id, random_ids: of the tokenizer, see `mask_words`.
      word_rate, region_rate: shares that are hidden.
      mismatch_rate: share of the examples that "itm" shows another image.
      whole_words: hide words and not tokens.
      most_words, most_regions: places of a row that a head runs on; 0: all. Further ones are not predicted.
      transport_weight: of the transport distance in "itm".
      average: "places": every hidden word or region of the batch counts alike, as in UNITER; "examples":
        every example counts alike.
      kl_mean: "classes" divides the divergence of "mrckl" by the number of classes as UNITER's code does
        (pretrain.py:293-295), which makes it 1601 times smaller; "places" does not, as in UNITER's paper.
    """

    ratios: Mapping[str, float | int]
    mask_id: int
    random_ids: tuple[int, int]
    word_rate: float = 0.15
    region_rate: float = 0.15
    mismatch_rate: float = 0.5
    whole_words: bool = False
    most_words: int = 0
    most_regions: int = 0
    transport_weight: float = 0.1
    average: str = "places"
    kl_mean: str = "classes"

    def __post_init__(self) -> None:
        """Raises ValueError where a field has a value that it cannot have."""
        if unknown := sorted(set(self.ratios) - HIDES.keys()):
            raise ValueError(f"ratios names {', '.join(unknown)}; it can have {', '.join(HIDES)}")
        if not self.ratios or any(not 0 < ratio < float("inf") for ratio in self.ratios.values()):
            raise ValueError(f"ratios gives each task a number above 0, found {dict(self.ratios)}")
        for name in ("word_rate", "region_rate", "mismatch_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is from 0 to 1")
        for name, known in (("average", AVERAGES), ("kl_mean", KL_MEANS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(known)}")

    def hides(self, task: Int[Array, ""], what: str) -> Bool[Array, ""]:
        """Whether the task of that index hides words, regions or images."""
        return jnp.array([HIDES[name] == what for name in self.ratios])[task]


@flax.struct.dataclass
class Corrupted:
    """A batch with something hidden: of words, regions and images only what the drawn task hides.

    Attributes:
      task: scalar, index into the ratios' names.
      tokens: [B, T] with hidden words.
      words: [B, T] bool, words to predict.
      regions: [B, R] bool, hidden regions: of the regions of `source`'s image.
      source: [B] int, the example whose regions, boxes and region mask an example is shown.
      matched: [B] bool, where that is an example of its own image.
    """

    task: Any
    tokens: Any
    words: Any
    regions: Any
    source: Any
    matched: Any


def corrupt(
    settings: Pretraining,
    key: PRNGKeyArray,
    *,
    tokens: Int[Array, "b t"],
    word_ids: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    maskable_regions: Bool[Array, "b r"],
    image_ids: Int[Array, " b"],
    mask: Bool[Array, " b"],
) -> Corrupted:
    """Draws a task and what it hides.

    Args:
      key: of the step, the same on all hosts.
      word_ids: -1 on tokens that are never hidden: [CLS], [SEP], padding.
      segments: part of the text (question, answer, rationale) of each token.
      maskable_regions: real regions but no whole-image region.
      image_ids, mask: of each example, and which examples count.
    """
    draw, words_key, regions_key, images_key = jax.random.split(key, 4)
    task = jax.random.categorical(draw, jnp.log(jnp.array(list(settings.ratios.values()), jnp.float32)))
    words = mask_words(
        words_key,
        tokens,
        (word_ids >= 0) & mask[:, None] & settings.hides(task, WORDS),
        mask_id=settings.mask_id,
        random_ids=settings.random_ids,
        rate=settings.word_rate,
        segments=segments,
        word_ids=word_ids if settings.whole_words else None,
    )
    regions = mask_regions(
        regions_key,
        maskable_regions & mask[:, None] & settings.hides(task, REGIONS),
        rate=settings.region_rate,
    )
    shown = mismatch_images(
        images_key, image_ids, mask & settings.hides(task, IMAGES), rate=settings.mismatch_rate
    )
    return Corrupted(task, words.tokens, words.chosen, regions, shown.source, shown.matched)


def pretraining_loss(
    settings: Pretraining,
    corrupted: Corrupted,
    heads: Mapping[str, Callable[..., Any]],
    *,
    tokens: Int[Array, "b t"],
    features: Float[Array, "b r c"],
    class_probs: Float[Array, "b r k"] | None = None,
    mask: Bool[Array, " b"],
    fits: Bool[Array, " b"],
) -> Outcome:
    """The drawn task's loss; only its head runs.

    Args:
      heads: of the model on its states of the corrupted batch, by task, for the tasks of the ratios:
        "mlm": places [B, M] -> logits [B, M, V]; "mrfr": places -> features [B, M, C];
        "mrc", "mrckl": places -> logits [B, M, K];
        "itm": () -> (logits [B, 2], word states [B, T, D], region states [B, R, D], and their masks [B, T]
        and [B, R], which decide what takes part in the transport).
      tokens, features, class_probs: the batch before it was corrupted; class_probs (background first) for
        "mrc" and "mrckl".
      mask: which examples count.
      fits: which texts say something true of their own image; with it, "itm" does not count the others.

    Returns:
      loss [B]; which examples count; and further metrics, each with the examples that it counts for:
      {task}_loss of every task, and mlm_accuracy, mrc_accuracy, itm_accuracy.

    Raises:
      ValueError: a head or class_probs is missing.
    """
    if missing := sorted(settings.ratios.keys() - heads.keys()):
        raise ValueError(f"the model has no head for {', '.join(missing)}; leave that out of ratios")
    if class_probs is None and {"mrc", "mrckl"} & settings.ratios.keys():
        raise ValueError(
            "mrc and mrckl need the detector's class probabilities: the region features have none"
        )
    average = settings.average
    none = jnp.zeros(len(mask))

    def mlm() -> tuple[Array, ...]:
        places, chosen = places_of(corrupted.words, settings.most_words)
        return masked_word_loss(heads["mlm"](places), at_places(tokens, places), chosen, average)

    def region(name: str) -> Callable[[], tuple[Array, ...]]:
        def run() -> tuple[Array, ...]:
            places, chosen = places_of(corrupted.regions, settings.most_regions)
            found = heads[name](places)
            if name == "mrfr":
                loss, valid = region_feature_loss(found, at_places(features, places), chosen, average)
                return loss, valid, none
            assert class_probs is not None
            probs = at_places(class_probs, places)
            if name == "mrc":
                return region_class_loss(found, probs, chosen, average)
            return *region_divergence(found, probs, chosen, average, settings.kl_mean), none

        return run

    def itm() -> tuple[Array, ...]:
        logits, *states = heads["itm"]()
        loss, accuracy = matching_loss(
            logits, corrupted.matched, transport_distance(*states), settings.transport_weight
        )
        return loss, fits | ~corrupted.matched, accuracy

    branches = {"mlm": mlm, "itm": itm} | {name: region(name) for name in ("mrfr", "mrc", "mrckl")}
    loss, valid, accuracy = jax.lax.switch(corrupted.task, [branches[name] for name in settings.ratios])
    valid = valid & mask
    metrics: dict[str, Counted] = {}
    for index, name in enumerate(settings.ratios):
        counted = valid & (corrupted.task == index)
        metrics[f"{name}_loss"] = (jnp.where(counted, loss, 0.0), counted)
        if name in ("mlm", "mrc", "itm"):
            metrics[f"{name}_accuracy"] = (jnp.where(counted, accuracy, 0.0), counted)
    return loss, valid, metrics


def mean_of_chosen(
    values: Float[Array, "b m"], chosen: Bool[Array, "b m"], average: str
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """One value an example from one a place, and which examples have a chosen place.

    Args:
      average: "examples": the mean over the example's chosen places. "places": their sum, scaled so that the
        mean over the examples that have some is the mean over all chosen places of the batch.
    """
    total = jnp.sum(jnp.where(chosen, values, 0.0), -1)
    count = chosen.sum(-1)
    valid = count > 0
    if average == "examples":
        return total / jnp.maximum(count, 1), valid
    return total * valid.sum() / jnp.maximum(count.sum(), 1), valid


def masked_word_loss(
    logits: Float[Array, "b m v"],
    targets: Int[Array, "b m"],
    chosen: Bool[Array, "b m"],
    average: str = "places",
) -> tuple[Float[Array, " b"], Bool[Array, " b"], Float[Array, " b"]]:
    """MLM: cross-entropy of the hidden words. Loss [B], which examples count, share of words found [B]."""
    logits = logits.astype(jnp.float32)
    found = jnp.where(chosen, logits.argmax(-1) == targets, False)
    loss, valid = mean_of_chosen(_cross_entropy(logits, targets), chosen, average)
    return loss, valid, mean_of_chosen(found.astype(jnp.float32), chosen, "examples")[0]


def region_feature_loss(
    found: Float[Array, "b m c"],
    features: Float[Array, "b m c"],
    chosen: Bool[Array, "b m"],
    average: str = "places",
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """MRFR: mean squared error of the hidden regions' features, a mean over their C numbers."""
    error = found.astype(jnp.float32) - features.astype(jnp.float32)
    return mean_of_chosen(jnp.mean(jnp.where(chosen[..., None], error, 0.0) ** 2, -1), chosen, average)


def region_class_loss(
    logits: Float[Array, "b m k"],
    class_probs: Float[Array, "b m k"],
    chosen: Bool[Array, "b m"],
    average: str = "places",
) -> tuple[Float[Array, " b"], Bool[Array, " b"], Float[Array, " b"]]:
    """MRC: cross-entropy against the detector's likeliest class, which is never the background (class 0).

    Loss [B], which examples count, share of regions whose class was found [B].
    """
    return masked_word_loss(logits, class_probs[..., 1:].argmax(-1) + 1, chosen, average)


def region_divergence(
    logits: Float[Array, "b m k"],
    class_probs: Float[Array, "b m k"],
    chosen: Bool[Array, "b m"],
    average: str = "places",
    kl_mean: str = "classes",
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """MRC-KL: KL(detector's distribution || softmax(logits)), background included; see `Pretraining`."""
    p = class_probs.astype(jnp.float32)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    divergence = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, -1)
    if kl_mean == "classes":
        divergence = divergence / logits.shape[-1]
    return mean_of_chosen(divergence, chosen, average)


def matching_loss(
    logits: Float[Array, "b 2"],
    matched: Bool[Array, " b"],
    distance: Float[Array, " b"],
    transport_weight: float = 0.1,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """ITM with word-region alignment: cross-entropy of "does the image belong to the text" (class 1: yes),
    plus the weighted transport distance where it does, minus it where it does not. Loss [B] and accuracy [B].
    """
    logits = logits.astype(jnp.float32)
    loss = _cross_entropy(logits, matched.astype(jnp.int32))
    loss = loss + transport_weight * jnp.where(matched, distance, -distance)
    return loss, ((logits[:, 1] > logits[:, 0]) == matched).astype(jnp.float32)


def _cross_entropy(logits: Float[Array, "*b v"], targets: Int[Array, "*b"]) -> Float[Array, "*b"]:
    right = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - right
