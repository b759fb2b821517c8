"""Retrieval metrics: R@K, median and mean rank, both ways, several captions a clip, ties shared fairly."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from clipdistill_jax.models.features import Features
from clipdistill_jax.train.sharding import fetch

RECALLS = (1, 5, 10)


def rank_metrics(
    scores: Float[np.ndarray, "q c"], target: Int[np.ndarray, " q"], prefix: str
) -> dict[str, float]:
    """Metrics of queries against candidates, in percent for the recalls.

    Candidates that tie with the right one are ordered at random, in expectation: R@K counts the chance that
    the right one is among the first K, and a rank is the mean over the orders. (CLIP4Clip counts each tie
    as a further hit, its issue 80.)

    Args:
      scores: of every query (rows) against every candidate; -inf for a candidate that is not there.
      target: the right candidate of each query.
      prefix: of the metrics' names.

    Returns:
      {prefix}_R@1, R@5, R@10, _MdR (median rank), _MnR (mean rank).

    Raises:
      ValueError: a score of a right candidate is not finite.
    """
    right = scores[np.arange(len(target)), target]
    if not np.isfinite(right).all():
        raise ValueError(f"{prefix}: the scores of {int((~np.isfinite(right)).sum())} queries are not finite")
    above = (scores > right[:, None]).sum(1)
    ties = (scores == right[:, None]).sum(1) - 1
    rank = 1 + above + ties / 2
    recalls = {
        f"{prefix}_R@{k}": float(100 * np.clip((k - above) / (ties + 1), 0, 1).mean()) for k in RECALLS
    }
    return {**recalls, f"{prefix}_MdR": float(np.median(rank)), f"{prefix}_MnR": float(rank.mean())}


def retrieval_metrics(
    scores: Float[np.ndarray, "t v"], clip_of_text: Int[np.ndarray, " t"]
) -> dict[str, float]:
    """Text-to-video and video-to-text metrics.

    Args:
      scores: of every caption (rows) against every clip.
      clip_of_text: the clip of each caption; every clip has at least one.

    A clip's score for another clip's captions is that of the best of them, as in CLIP4Clip
    (metrics.py:34-70), so that video-to-text ranks clips too.
    """
    texts, clips = scores.shape
    best = np.full((clips, clips), -np.inf, scores.dtype)  # [clip whose captions, clip]
    np.maximum.at(best, clip_of_text, scores)
    return {
        **rank_metrics(scores, clip_of_text, "t2v"),
        **rank_metrics(np.ascontiguousarray(best.T), np.arange(clips), "v2t"),
    }


def pair_accuracy(
    scores: Float[np.ndarray, "t v"],
    clip_of_text: Int[np.ndarray, " t"],
    pairs: Sequence[tuple[int, int]],
) -> float:
    """Percent of captions of a pair's clips that prefer their own clip to the other; a tie is half.

    Raises:
      ValueError: there are no pairs.
    """
    other = {a: b for x, y in pairs for a, b in ((x, y), (y, x))}
    texts = [t for t, clip in enumerate(clip_of_text) if int(clip) in other]
    if not texts:
        raise ValueError("none of the captions belongs to a pair")
    own = scores[texts, clip_of_text[texts]]
    rival = scores[texts, [other[int(clip_of_text[t])] for t in texts]]
    return float(100 * ((own > rival) + 0.5 * (own == rival)).mean())


def embed(
    encode: Callable[[dict[str, Any]], Features],
    batches: Iterable[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
) -> Features:
    """Encodes every batch once and returns the real rows on the host, on every host.

    Args:
      encode: jitted; a batch -> Features with one row an example.
      batches: with a bool `mask`, False on padding.
      place: puts a host batch on the devices.

    Raises:
      ValueError: there are no batches.
    """
    parts: list[tuple[Features, Bool[np.ndarray, " b"]]] = []
    for batch in batches:
        placed = place(batch)
        rows = {name: value for name, value in placed.items() if name != "mask"}
        parts.append(fetch((encode(rows), placed["mask"])))
    if not parts:
        raise ValueError("there is nothing to embed: no batches")
    return jax.tree.map(
        lambda *leaves: np.concatenate([x[mask] for x, (_, mask) in zip(leaves, parts, strict=True)]),
        *[features for features, _ in parts],
    )


def score_matrix(
    similarity: Callable[[Features, Features], Any], text: Features, video: Features, block: int = 4096
) -> Float[np.ndarray, "t v"]:
    """Scores of all texts against all clips, a block of texts at a time.

    Args:
      similarity: jitted; (text Features, video Features) -> [t, v].
      block: texts at a time; the last block is padded by repeating a row, so that one shape is compiled.
    """
    total = len(text.text)
    block = min(block, total)
    rows = []
    for start in range(0, total, block):
        index = np.minimum(np.arange(start, start + block), total - 1)
        part = jax.tree.map(lambda x, index=index: x[index], text)
        rows.append(np.asarray(jax.device_get(similarity(part, video)))[: total - start])
    return np.concatenate(rows)
