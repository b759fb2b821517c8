"""Evaluates a dual encoder on a split: every clip and every caption embedded once, then one score matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.evaluate.retrieval import embed, pair_accuracy, retrieval_metrics, score_matrix
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Features
from clipdistill_jax.train.sharding import place_batch

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Split:
    """What is evaluated.

    Attributes:
      clips: batches of frames, frame_mask and mask: every clip once, in order.
      texts: batches of tokens, token_mask, word_ids and mask: every caption once, in order.
      clip_of_text: the clip of each caption.
      pairs: clips that differ only in motion, or none.
    """

    clips: Batches
    texts: Batches
    clip_of_text: np.ndarray
    pairs: Sequence[tuple[int, int]] = ()


class RetrievalEvaluator:
    """Scores a model's variables on splits. Compiles once for each shape of batch."""

    def __init__(self, module: DualEncoder, mesh: Mesh) -> None:
        self._mesh = mesh

        def video(variables: Any, batch: dict[str, Any]) -> Features:
            seen: Any = module.apply(variables, batch["frames"], batch["frame_mask"], method="encode_video")
            # Only what `similarity` reads comes back to the host; feature maps would fill it.
            return Features(frames=seen.frames, frame_mask=seen.frame_mask, video=seen.video)

        def text(variables: Any, batch: dict[str, Any]) -> Features:
            said: Any = module.apply(
                variables, batch["tokens"], batch["token_mask"], batch["word_ids"], method="encode_text"
            )
            return Features(text=said.text)

        self._video, self._text = jax.jit(video), jax.jit(text)
        self._similarity = jax.jit(lambda variables, t, v: module.apply(variables, t, v, method="similarity"))

    def scores(self, variables: Any, split: Split) -> np.ndarray:
        """Scaled scores [captions, clips], the same on every host."""

        def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            return place_batch(batch, self._mesh)

        with jax.set_mesh(self._mesh):
            video = embed(lambda batch: self._video(variables, batch), split.clips(), place)
            text = embed(lambda batch: self._text(variables, batch), split.texts(), place)
            return score_matrix(lambda t, v: self._similarity(variables, t, v), text, video)

    def __call__(self, variables: Any, split: Split) -> tuple[dict[str, float], np.ndarray]:
        """Metrics, and the scores they are of."""
        scores = self.scores(variables, split)
        metrics = retrieval_metrics(scores, split.clip_of_text)
        if split.pairs:
            metrics["motion_pairs"] = pair_accuracy(scores, split.clip_of_text, split.pairs)
        return metrics, scores
