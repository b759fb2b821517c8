"""Tasks with a set of answers to choose from: VCR's four choices, SNLI-VE's three labels, VQA's vocabulary.

Losses give one value an example, outcomes one number an example in [0, 1]; a label below 0 is unknown (a test
set, an unlabelled question), and such an example counts for nothing here.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.tasks.pretraining import mean_of_chosen

Task = Callable[
    [Features, Batch], tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Float[Array, " b"]]]
]
CHOICE_LOSSES = ("pairs", "sigmoid", "softmax")
LABEL_LOSSES = ("sigmoid", "softmax")
RANKINGS = ("logit", "log_odds")


def choice_loss(logits: Float[Array, "b *kn"], label: Int[Array, " b"], kind: str) -> Float[Array, " b"]:
    """Loss of choosing one of K, a value an example; 0 where the label is unknown.

    Args:
      logits: [B, K], or [B, K, 2] for "pairs".
      label: the right choice, below 0 where unknown.
      kind: "pairs": each choice is judged alone, by cross-entropy of (wrong, right), and the mean over the
        choices is taken (ChenRocks/UNITER model/vcr.py:69-77, and VILLA); "sigmoid": the same with one logit
        a choice (jackroos/VL-BERT resnet_vlbert_for_vcr.py:345-367); "softmax": cross-entropy over the
        choices (rowanz/r2c).

    Raises:
      ValueError: another kind, or logits of another shape.
    """
    _check("choice loss", kind, CHOICE_LOSSES)
    logits = logits.astype(jnp.float32)
    if logits.ndim != (3 if kind == "pairs" else 2) or (kind == "pairs" and logits.shape[-1] != 2):
        shape = "[B, K, 2]" if kind == "pairs" else "[B, K]"
        raise ValueError(f"the choice loss {kind!r} takes logits {shape}, found {list(logits.shape)}")
    right = jax.nn.one_hot(label, logits.shape[1])
    if kind == "softmax":
        values = -jnp.sum(right * jax.nn.log_softmax(logits, -1), -1)
    else:
        scores = logits[..., 1] - logits[..., 0] if kind == "pairs" else logits
        values = jnp.mean(_binary(scores, right), -1)
    return jnp.where(label >= 0, values, 0.0)


def choice_scores(logits: Float[AnyArray, "b *kn"], ranking: str = "logit") -> Float[AnyArray, "b k"]:
    """What the choices are ranked by, from [B, K] or [B, K, 2].

    Args:
      ranking: of [B, K, 2]: "logit": the logit of "right" alone, as UNITER and VILLA do, although their loss
        leaves its size open; "log_odds": right minus wrong, which is what the loss trains.

    Raises:
      ValueError: another ranking.
    """
    _check("ranking", ranking, RANKINGS)
    if logits.ndim == 2:
        return logits
    return logits[..., 1] if ranking == "logit" else logits[..., 1] - logits[..., 0]


def label_loss(logits: Float[Array, "b n"], targets: Float[Array, "b n"], kind: str) -> Float[Array, " b"]:
    """Loss against soft scores of N answers, or one-hot labels: a value an example.

    Args:
      logits: of every answer.
      targets: in [0, 1]: VQA's soft scores, SNLI-VE's label; they need not sum to one.
      kind: "sigmoid": binary cross-entropy, summed over the answers (ChenRocks/UNITER train_vqa.py:187-188
        and, for SNLI-VE too, train_ve.py; VILLA and VL-BERT alike); "softmax": -sum targets * log softmax
        (clip-vil/CLIP-ViL src/tasks/snli.py:87).

    Raises:
      ValueError: another kind.
    """
    _check("label loss", kind, LABEL_LOSSES)
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    if kind == "softmax":
        return -jnp.sum(targets * jax.nn.log_softmax(logits, -1), -1)
    return jnp.sum(_binary(logits, targets), -1)


def object_loss(
    logits: Float[Array, "b r n"],
    classes: Int[Array, "b r"],
    region_mask: Bool[Array, "b r"],
    average: str = "places",
) -> Float[Array, " b"]:
    """Cross-entropy of the regions' object classes from their last states, a value an example.

    VL-BERT adds it to VCR's loss, weight 1, as a mean over all regions of the batch ("places";
    resnet_vlbert_for_vcr.py:387-397); "examples" is the mean over each example's regions.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    right = jnp.take_along_axis(log_p, jnp.maximum(classes, 0)[..., None], -1)[..., 0]
    return mean_of_chosen(-right, region_mask & (classes >= 0), average)[0]


def choice_task(kind: str, ranking: str = "logit") -> Task:
    """VCR for the trainer: (features, batch) -> loss [B], which examples count, {"accuracy": [B]}.

    Reads features.logits ([B, K], or [B, K, 2] with "pairs"), batch["label"] [B] and batch["mask"] [B]. One
    task serves Q->A and QA->R: a batch may mix their questions, as UNITER's does.
    """

    def task(
        features: Features, batch: Batch
    ) -> tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Float[Array, " b"]]]:
        label = batch["label"]
        valid = batch["mask"] & (label >= 0)
        right = choice_scores(features.logits, ranking).argmax(-1) == label
        return choice_loss(features.logits, label, kind), valid, {"accuracy": right.astype(jnp.float32)}

    return task


def entailment_task(kind: str = "sigmoid") -> Task:
    """SNLI-VE for the trainer, as `choice_task`: features.logits [B, 3], batch["label"], batch["mask"]."""

    def task(
        features: Features, batch: Batch
    ) -> tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Float[Array, " b"]]]:
        logits, label = features.logits, batch["label"]
        loss = label_loss(logits, jax.nn.one_hot(label, logits.shape[-1]), kind)
        right = (logits.argmax(-1) == label).astype(jnp.float32)
        return loss, batch["mask"] & (label >= 0), {"accuracy": right}

    return task


def answer_task(kind: str = "sigmoid") -> Task:
    """VQA for the trainer, as `choice_task`: features.logits [B, V]; batch["targets"] [B, V], soft scores;
    batch["labelled"] and batch["mask"] [B].

    A question none of whose answers is in the vocabulary is labelled, and all its scores are 0. The accuracy
    is the soft score of the answer with the highest logit.
    """

    def task(
        features: Features, batch: Batch
    ) -> tuple[Float[Array, " b"], Bool[Array, " b"], dict[str, Float[Array, " b"]]]:
        logits, targets = features.logits, batch["targets"]
        score = jnp.take_along_axis(targets, logits.argmax(-1)[:, None], 1)[:, 0]
        loss = label_loss(logits, targets, kind)
        return loss, batch["mask"] & batch["labelled"], {"accuracy": score.astype(jnp.float32)}

    return task


def by_category(
    outcomes: Float[np.ndarray, " n"], categories: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """(sum, count) of the outcomes of every category, by name.

    Args:
      outcomes: one number an example.
      categories: of each example: VCR's question category, VQA's answer type, SNLI-VE's label.

    Raises:
      ValueError: there are not as many categories as outcomes.
    """
    if len(outcomes) != len(categories):
        raise ValueError(f"{len(outcomes)} outcomes, but {len(categories)} categories")
    names, index = np.unique(np.asarray(categories, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(index, np.asarray(outcomes, np.float64), len(names))
    counts = np.bincount(index, minlength=len(names))
    return {str(name): (float(s), float(c)) for name, s, c in zip(names, sums, counts, strict=True)}


def _binary(logits: Float[Array, "*b"], targets: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """-t log sigmoid(x) - (1 - t) log sigmoid(-x), without overflow."""
    return jax.nn.softplus(logits) - targets * logits


def _check(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"the {what} is {value!r}; it can be {', '.join(known)}")
