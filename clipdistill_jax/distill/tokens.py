"""Token-selective distillation of CLIP-TD: which words matter, and the term that matches their vectors."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.distill.clip_td import ChoiceKD, over_choices, vector_distance
from clipdistill_jax.models.features import Features
from clipdistill_jax.models.temporal import unit


def visual_relevance(
    image: Float[Array, "b d"], words: Float[Array, "b *k w d"], word_mask: Bool[Array, "b *k w"]
) -> Float[Array, "b *k w"]:
    """S_vr: cosine of the image with each word of its texts, in float32; 0 where negative or not a word."""
    # Words are ranked by differences that the rounding of bfloat16 or TF32 would hide.
    cosines = jnp.einsum("b...d,bd->b...", unit(words), unit(image), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(word_mask, jnp.maximum(cosines, 0.0), 0.0)


def shares(scores: Float[Array, "*b w"], word_mask: Bool[Array, "*b w"]) -> Float[Array, "*b w"]:
    """Scores of at least 0 divided by their sum over a text's words; all 0 where the sum is."""
    scores = jnp.where(word_mask, scores.astype(jnp.float32), 0.0)
    total = jnp.sum(scores, -1, keepdims=True)
    return jnp.where(total > 0, scores / jnp.where(total > 0, total, 1.0), 0.0)


def word_scores(
    relevance: Float[Array, "*b w"], importance: Float[Array, "*b w"], word_mask: Bool[Array, "*b w"]
) -> Float[Array, "*b w"]:
    """S of CLIP-TD (eq. 5): S_vr / |S_vr|_1 + S_si / |S_si|_1 over a text's words."""
    return shares(relevance, word_mask) + shares(importance, word_mask)


def choose_words(
    scores: Float[Array, "*b w"], word_mask: Bool[Array, "*b w"], count: int
) -> tuple[Int[Array, "*b m"], Bool[Array, "*b m"]]:
    """The `count` words with the highest scores (eq. 6), best first; of equal ones the earlier word.

    Args:
      scores: at least 0.
      word_mask: the words to choose from.
      count: m; a text with fewer words gives all of them.

    Returns:
      Places of the words, and which of the places hold one: [..., min(count, W)].

    Raises:
      ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one word has to be chosen")
    _, places = jax.lax.top_k(jnp.where(word_mask, scores, -1.0), min(count, scores.shape[-1]))
    return places, jnp.take_along_axis(word_mask, places, -1)


class TokenKD(ChoiceKD):
    """L_dt' of CLIP-TD (eqs. 5 to 7): CLIP's and the student's vectors of the words that matter most.

    Words align by index, whatever tokenizers made them, and count where both models have them. The distance
    is summed over the chosen words, as in eq. 7. Where the paper is silent: scores are those of words, not
    of sub-tokens; a negative cosine is no relevance, so that the L1 norm is a mass.

    Attributes:
      count: m, words chosen of each text (2 is best: 9.2, Table 8).
      selection: "scores"; or "random", the ablation: any words of the text, drawn anew in every step.
      content_only: leave out words without importance: stop words, punctuation and numbers. Else they can
        be chosen for their visual relevance alone, as eq. 5 has it.
    """

    count: int = 2
    selection: str = "scores"
    content_only: bool = False
    needs: ClassVar = ("words", "word_mask")

    @nn.compact
    def __call__(self, student: Features, teacher: Features, valid: Bool[Array, " b"]) -> Float[Array, " b"]:
        """[B]: the summed distance of the chosen words; 0 for a text without words.

        The teacher gives `image` and `importance` too, where they are asked for.
        """
        teacher = jax.lax.stop_gradient(teacher)
        self._check(teacher)
        slots = min(student.words.shape[-2], teacher.words.shape[-2])
        words, mask = teacher.words[..., :slots, :], teacher.word_mask[..., :slots]
        mask = mask & student.word_mask[..., :slots]
        if self.content_only:
            mask = mask & (teacher.importance[..., :slots] > 0)
        if self.selection == "random":
            scores = jax.random.uniform(self.make_rng("mask"), mask.shape)
        else:
            relevance = visual_relevance(teacher.image, words, mask)
            scores = word_scores(relevance, teacher.importance[..., :slots], mask)
        places, chosen = choose_words(scores, mask, self.count)
        ours, theirs = (jnp.take_along_axis(x, places[..., None], -2) for x in (student.words, words))
        values = vector_distance(self.projected(ours, theirs), theirs, self.distance)
        return over_choices(jnp.sum(jnp.where(chosen, values, 0.0), -1), teacher.label, self.choices)

    def _check(self, teacher: Features) -> None:
        if self.selection not in ("scores", "random"):
            raise ValueError(f"selection is {self.selection!r}; it can be 'scores' or 'random'")
        needed = ("image", "importance") if self.selection == "scores" else ()
        needed = ("importance", *needed) if self.content_only else needed
        missing = sorted(set(needed) - teacher.given())
        if missing:
            raise ValueError(
                f"term 'tokens' needs {', '.join(missing)} of the teacher, which does not give it"
            )
        if needed and teacher.importance.shape != teacher.word_mask.shape:
            raise ValueError(
                f"term 'tokens': the importance of words is {teacher.importance.shape}, and the teacher's "
                f"words are {teacher.word_mask.shape}"
            )
