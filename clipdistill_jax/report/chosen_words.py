"""Which words a stage distils, of a few of the questions that it learns from: a stage's words.npz."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.distill.tokens import TokenKD
from clipdistill_jax.report.tokens import WordScores, score_words, write_words
from clipdistill_jax.train import sharding

EXAMPLES = 4
_FIELDS = ("image", "words", "word_mask", "importance")


def note_words(
    path: Path, stage: Any, dataset: Any, variables: Any, batch: Mapping[str, np.ndarray], mesh: Mesh
) -> None:
    """Writes the scores of the words of a batch's first questions; nothing where none are chosen by score.

    Args:
      path: of the file.
      stage: as built.
      dataset: that the batch is of.
      variables: the frozen models', on the devices.
      batch: this process's rows, as the step takes them.
      mesh: of the run.
    """
    term = next((weighted.term for weighted in stage.terms if isinstance(weighted.term, TokenKD)), None)
    if term is None or term.selection != "scores":
        return
    teach = stage.system.teach(stage.teachers["clip"].module, stage.config, "clip", layers=False)
    with jax.set_mesh(mesh):
        features = jax.jit(teach)(variables["clip"], sharding.place_batch(dict(batch), mesh))
        taught = sharding.fetch({name: getattr(features, name) for name in _FIELDS})
    if jax.process_index() == 0:
        own = stage.system.own(batch, stage.config)
        write_words(path, _scores(taught, batch, np.asarray(own["word_ids"]), dataset, term))


def _scores(
    taught: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    student: np.ndarray,
    dataset: Any,
    term: TokenKD,
) -> dict[str, WordScores]:
    ids = batch["example_id"].tolist()
    said, found = dataset.choice_words(set(ids)), {}
    for row, example in enumerate(ids):
        name, choices = said[example]
        # The right one, where the label is that of a choice: SNLI-VE's is none of its one text.
        choice = max(int(batch["label"][row]), 0) if len(choices) > 1 else 0
        place = min(choice, len(student[row]) - 1)  # pretraining has the right choice alone
        mask = np.asarray(taught["word_mask"][row, place]).copy()
        mask &= np.isin(np.arange(len(mask)), student[row, place])
        words = choices[choice]
        # Of a text that was cut, words count from another one: such an example is not shown.
        if name in found or len(words) > len(mask) or not mask[len(words) - 1]:
            continue
        vectors, importance = taught["words"][row, place], taught["importance"][row, place]
        image = taught["image"][row]
        found[name] = score_words(
            words, image, vectors, mask, importance, count=term.count, content_only=term.content_only
        )
        if len(found) == EXAMPLES:
            break
    return found
