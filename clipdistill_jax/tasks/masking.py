"""What pretraining hides of a batch: words, regions, and whose image an example is shown.

All on the device, for a whole batch; the same key and batch give the same result, and no argument is changed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class MaskedWords(NamedTuple):
    """Tokens with some hidden, and which are to be predicted; the targets are the tokens before."""

    tokens: Int[Array, "b t"]
    chosen: Bool[Array, "b t"]


class ShownImages(NamedTuple):
    """Whose image each example is shown (a row of the batch), and whether that is its own."""

    source: Int[Array, " b"]
    matched: Bool[Array, " b"]


def mask_words(
    key: PRNGKeyArray,
    tokens: Int[Array, "b t"],
    maskable: Bool[Array, "b t"],
    *,
    mask_id: int,
    random_ids: tuple[int, int],
    rate: float = 0.15,
    segments: Int[Array, "b t"] | None = None,
    word_ids: Int[Array, "b t"] | None = None,
) -> MaskedWords:
    """BERT's masking: `rate` of the tokens are chosen; 80% of them become [MASK], 10% another, 10% stay.

    A text of which none is chosen gets [MASK] for its first maskable token (ChenRocks/UNITER data/mlm.py).

    Args:
      maskable: tokens that may be chosen: no [CLS], [SEP], padding, or example that does not count.
      mask_id: of [MASK].
      random_ids: first id and end of the range that "another" is drawn from.
      segments: parts of a text, each of which has at least one chosen (UNITER data/pretrain_vcr.py masks
        question, answer and rationale one by one); None: the text is one part.
      word_ids: the word of each token, counted in its segment; all tokens of a word share their fate, as in
        VL-BERT's pretraining. None draws for every token, as UNITER does.
    """
    choose, change, other = jax.random.split(key, 3)
    position = jnp.arange(tokens.shape[1])
    together = maskable[:, :, None] & maskable[:, None, :]  # [B, T, T]: tokens of one segment
    if segments is not None:
        together &= segments[:, :, None] == segments[:, None, :]
    first = jnp.argmax(together, -1)  # of its segment, for every token
    unit = jnp.broadcast_to(position, tokens.shape)  # the token that draws for it
    if word_ids is not None:
        unit = jnp.argmax(together & (word_ids[:, :, None] == word_ids[:, None, :]), -1)

    def draw(key: PRNGKeyArray) -> Float[Array, "b t"]:
        return jnp.take_along_axis(jax.random.uniform(key, tokens.shape), unit, 1)

    drawn = maskable & (draw(choose) < rate)
    lonely = maskable & ~jnp.any(together & drawn[:, None, :], -1)
    forced = lonely & (unit == jnp.take_along_axis(unit, first, 1))
    kind = draw(change)
    others = jax.random.randint(other, tokens.shape, *random_ids, dtype=tokens.dtype)
    hidden = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, others, tokens))
    hidden = jnp.where(drawn, hidden, jnp.where(forced, mask_id, tokens))
    return MaskedWords(hidden.astype(tokens.dtype), drawn | forced)


def mask_regions(
    key: PRNGKeyArray, maskable: Bool[Array, "b r"], *, rate: float = 0.15
) -> Bool[Array, "b r"]:
    """Which regions are hidden: `rate` of them, and at least one (ChenRocks/UNITER data/mrm.py:15-21).

    Args:
      maskable: regions that may be hidden: no padding, no whole-image region, no example that does not count.
    """
    draw = jnp.where(maskable, jax.random.uniform(key, maskable.shape), 2.0)
    return maskable & ((draw < rate) | (draw == draw.min(-1, keepdims=True)))


def hide_regions(features: Float[Array, "b r c"], chosen: Bool[Array, "b r"]) -> Float[Array, "b r c"]:
    """Features [B, R, C] with zeros for the chosen regions."""
    return jnp.where(chosen[..., None], 0, features)


def mismatch_images(
    key: PRNGKeyArray, image_ids: Int[Array, " b"], valid: Bool[Array, " b"], *, rate: float = 0.5
) -> ShownImages:
    """Shows some examples the image of another one, for image-text matching.

    UNITER draws the other image from the whole dataset (data/itm.py:41-95); here it is that of another
    example of the batch, drawn anew every step, so that nothing more is read.

    Args:
      image_ids: of each example; examples of one image are no mismatch.
      valid: which examples count; only these give and get images.
      rate: share of the examples that are mismatched; one for which the batch has no other image is not.
    """
    pick, toss = jax.random.split(key)
    rows = jnp.arange(len(valid))
    others = valid[None, :] & valid[:, None] & (image_ids[None, :] != image_ids[:, None])
    scores = jnp.where(others, jax.random.uniform(pick, others.shape), -1.0)
    swap = others.any(-1) & (jax.random.uniform(toss, valid.shape) < rate)
    return ShownImages(jnp.where(swap, scores.argmax(-1), rows), ~swap)


def places_of(chosen: Bool[Array, "b n"], most: int = 0) -> tuple[Int[Array, "b m"], Bool[Array, "b m"]]:
    """The first `most` chosen places of each row, so that a head runs on these alone.

    Args:
      chosen: True at the places.
      most: of a row; further ones are left out. 0 gives all N places in their order.

    Returns:
      places [B, M], and which of them are chosen ones.
    """
    length = chosen.shape[1]
    if most <= 0 or most >= length:
        return jnp.broadcast_to(jnp.arange(length), chosen.shape), chosen
    places = jnp.argsort(~chosen, axis=-1, stable=True)[:, :most]
    return places, jnp.take_along_axis(chosen, places, 1)


def at_places(x: Array, places: Int[Array, "b m"]) -> Array:
    """[B, N, ...] at places [B, M] -> [B, M, ...]."""
    index = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1)
