"""The confidence gate of CLIP-TD: distil where CLIP is surer than the student; and CLIP's logits for it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipdistill_jax.distill.clip_td import CHOICES
from clipdistill_jax.models.features import Features
from clipdistill_jax.models.temporal import unit


def log_confidence(logits: Float[Array, "b k"], label: Int[Array, " b"] | None = None) -> Float[Array, " b"]:
    """Log of the softmax of the most likely choice, or of the labelled one, in float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    if label is None:
        return jnp.max(log_p, -1)
    return jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], -1)[:, 0]


@dataclasses.dataclass(frozen=True)
class ConfidenceGate:
    """w_r / w of CLIP-TD (eqs. 9 and 10): 1 where r = T * max softmax(teacher) / max softmax(student) > 1.

    Attributes:
      temperature: T; the paper gives none, and 1 compares the two as they are.
      choices: "all" takes the confidence in the most likely of the choices, as eq. 9; "correct" that in the
        right one, which needs labels: without one the gate is closed.
    """

    temperature: float = 1.0
    choices: str = "all"
    needs: ClassVar = ("logits",)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it has to be positive")
        if self.choices not in CHOICES:
            raise ValueError(f"choices is {self.choices!r}; it can be one of {', '.join(CHOICES)}")

    def __call__(self, student: Features, teacher: Features) -> Float[Array, " b"]:
        """[B] of 0 and 1, without gradient.

        Raises:
          ValueError: the models do not score the same choices, or a label is needed and not given.
        """
        ratio = self.log_ratio(student, teacher)
        return jax.lax.stop_gradient((ratio > 0).astype(jnp.float32))

    def log_ratio(self, student: Features, teacher: Features) -> Float[Array, " b"]:
        """log r, which stays finite where a probability vanishes; -inf where a needed label is not known."""
        shapes = [None if x.logits is None else x.logits.shape for x in (student, teacher)]
        if shapes[0] is None or shapes[0] != shapes[1]:
            raise ValueError(
                "the confidence gate needs the logits of both models over the same choices; the student's "
                f"are {shapes[0]}, the teacher's {shapes[1]}"
            )
        label = teacher.label if self.choices == "correct" else None
        if self.choices == "correct" and label is None:
            raise ValueError("the confidence gate with choices='correct' needs labels: the batch has none")
        theirs, ours = log_confidence(teacher.logits, label), log_confidence(student.logits, label)
        ratio = math.log(self.temperature) + (theirs - ours)
        return ratio if label is None else jnp.where(label >= 0, ratio, -jnp.inf)


def choice_logits(
    image: Float[Array, "b d"],
    text: Float[Array, "b k d"] | Float[Array, "k d"],
    logit_scale: Float[Array, ""] | float | int,
) -> Float[Array, "b k"]:
    """CLIP's logits of the choices: logit_scale * cos(image, text), in float32.

    Args:
      image: vectors.
      text: each image's own choices [B, K, D], or the same for all [K, D], such as VQA's prompted answers.
      logit_scale: factor on cosines.
    """
    subscripts = "bd,bkd->bk" if text.ndim == 3 else "bd,kd->bk"
    # A scale of 100 follows: the rounding of bfloat16 or TF32 would show.
    cosines = jnp.einsum(subscripts, unit(image), unit(text), precision=jax.lax.Precision.HIGHEST)
    return logit_scale * cosines


def answer_prompts(answers: Sequence[str], template: str) -> list[str]:
    """The texts whose similarity to the image is CLIP's logit of an answer (VQA).

    The question is not in them: one text an answer serves all questions, where texts of questions and
    answers would be 3129 a question.

    Args:
      answers: the vocabulary, in the order of the student's logits.
      template: with {} for the answer, such as "a photo of {}".

    Raises:
      ValueError: the template has no {}.
    """
    if template.count("{}") != 1:
        raise ValueError(f"the template {template!r} should have one {{}}, where the answer goes")
    before, after = template.split("{}")
    return [f"{before}{answer}{after}" for answer in answers]


def fit_anchors(similarity: Float[np.ndarray, " n"]) -> Float[np.ndarray, "3"]:
    """The centres of k-means with k = 3 on similarities of images and hypotheses (SNLI-VE; CLIP-TD, 4.2.1).

    No labels are used: the cluster of the lowest similarities stands for contradiction, the highest for
    entailment, the one between for neutral. On a line the optimum is found exactly, by trying all pairs of
    cuts between sorted values: no start, no seed. Time grows with n^2: two seconds for the 17,858 pairs of
    the validation split.

    Args:
      similarity: logit_scale * cosine; see `anchor_logits`.

    Returns:
      Centres of contradiction, entailment, neutral: the order of UNITER's labels.

    Raises:
      ValueError: fewer than three different values, or one that is not finite.
    """
    values = np.sort(similarity.astype(np.float64))
    if not np.isfinite(values).all():
        raise ValueError(f"{(~np.isfinite(values)).sum()} of the {len(values)} similarities are not finite")
    if len(np.unique(values)) < 3:
        raise ValueError(f"three anchors need three different similarities, found {len(np.unique(values))}")
    shift, n = values.mean(), len(values)
    sums, squares = (np.concatenate([[0], np.cumsum((values - shift) ** p)]) for p in (1, 2))

    def cost(start, end):
        """Squared distances of values[start:end] to their mean."""
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    best: tuple[float, int, int] = (np.inf, 0, 0)
    for first in range(1, n - 1):
        second = np.arange(first + 1, n)
        costs = cost(0, first) + cost(first, second) + cost(second, n)
        k = int(costs.argmin())
        best = min(best, (float(costs[k]), first, int(second[k])))
    low, middle, high = (part.mean() for part in np.split(values, best[1:]))
    return np.array([low, high, middle])


def anchor_logits(similarity: Float[Array, " b"], anchors: Float[Array, "3"]) -> Float[Array, "b 3"]:
    """CLIP's logits of contradiction, entailment and neutral: minus the squared distance to their anchors.

    Both in units of logit_scale * cosine: between bare cosines the distances are so small that the softmax
    would be flat, and CLIP never sure.
    """
    return -((similarity.astype(jnp.float32)[:, None] - anchors) ** 2)
