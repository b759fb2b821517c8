"""Evaluates models that answer questions: VCR's choices, SNLI-VE's labels, VQA's open answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.joint import ANSWERS
from clipdistill_jax.tasks.choices import by_category, choice_scores
from clipdistill_jax.train.sharding import fetch, place_batch

Forward = Callable[[Any, Any, Batch], Features]
VCR_METRICS = {"Q->A": "qa", "QA->R": "qar"}  # metric -> kind of the items that it is of


@dataclasses.dataclass(frozen=True)
class QuestionSplit:
    """What is evaluated: n items, each a question with its choices.

    Attributes:
      batches: of the model's inputs; `example_id`, an item's place in the arrays below; `mask`, False on
        padding; for VQA `targets`, how right each answer is, and `labelled`. Every item once, in any order.
      kinds: "qa" (VCR's answers), "qar" (its rationales, given an answer), "ve" or "vqa".
      record_ids: a "qa" and a "qar" item of one record have the same.
      categories: that accuracies are split by, "" for none.
      labels: the right choice; -1 where there is none: in a test set, of rationales given a wrong answer.
        VQA's right answers are its targets.
    """

    batches: Callable[[], Iterable[dict[str, np.ndarray]]]
    kinds: np.ndarray
    record_ids: np.ndarray
    categories: np.ndarray
    labels: Int[np.ndarray, " n"]


class ChoiceEvaluator:
    """Answers the questions of splits. Compiles once for each shape of batch."""

    def __init__(
        self,
        module: Any,
        mesh: Mesh,
        *,
        kind: str,
        ranking: str = "logit",
        forward: Forward | None = None,
        never: Sequence[int] = (),
    ) -> None:
        """Builds what is compiled.

        Args:
          module: the model.
          mesh: where it runs.
          kind: "vcr", "ve" or "vqa": the head that answers, the only one that is run.
          ranking: of VCR's choices where the head gives two numbers a choice (`tasks.choices`).
          forward: (module, variables, batch) -> Features with logits, for models of another kind: CLIP
            choosing by its own scores, say.
          never: answers of VQA's vocabulary that are none, such as VL-BERT's "<unk>".

        Raises:
          ValueError: another kind.
        """
        if kind not in ANSWERS:
            raise ValueError(f"the kind of question is {kind!r}; it can be {', '.join(ANSWERS)}")
        self._mesh = mesh
        excluded = np.array(sorted(set(never)), np.int32)

        def joint(module: Any, variables: Any, batch: Batch) -> Features:
            return module.apply(variables, batch, heads=(kind,))

        ask = joint if forward is None else forward

        def answers(variables: Any, batch: Batch) -> dict[str, Array]:
            scores = answer_scores(ask(module, variables, batch), kind, ranking)
            chosen = scores.at[:, excluded].set(-jnp.inf).argmax(-1).astype(jnp.int32)
            found = {"chosen": chosen, "finite": jnp.isfinite(scores).all(-1)}
            if kind != "vqa":
                return {**found, "scores": scores}
            # Thousands of answers a question stay on the devices.
            score = jnp.take_along_axis(jnp.asarray(batch["targets"]), chosen[:, None], 1)[:, 0]
            return {**found, "outcome": score, "judged": batch["labelled"]}

        self._answers = jax.jit(answers)

    def answer(self, variables: Any, split: QuestionSplit) -> dict[str, np.ndarray]:
        """What the model says of every item, the same on every host.

        Returns:
          chosen [n] int: index of the choice or answer; outcome [n] float: how right it is, 0 to 1;
          judged [n] bool: False where that is not known (and outcome 0); scores [n, K] of the choices, which
          VQA leaves out.

        Raises:
          ValueError: the batches do not bring every item once, or a score is not finite.
        """
        parts: list[dict[str, np.ndarray]] = []
        with jax.set_mesh(self._mesh):
            for batch in split.batches():
                placed = place_batch(batch, self._mesh)
                where = {name: placed.pop(name) for name in ("mask", "example_id")}
                found = fetch({**self._answers(variables, placed), **where})
                mask = found.pop("mask")
                parts.append({name: x[mask] for name, x in found.items()})
        arrays = _in_order(parts, len(split.kinds))
        wrong = int((~arrays.pop("finite")).sum())
        if wrong:
            raise ValueError(f"the scores of {wrong} of {len(split.kinds)} questions are not finite")
        if "outcome" not in arrays:
            arrays["judged"] = split.labels >= 0
            arrays["outcome"] = arrays["chosen"] == split.labels
        arrays["outcome"] = np.where(arrays["judged"], arrays["outcome"], 0).astype(np.float32)
        return arrays

    def __call__(
        self, variables: Any, split: QuestionSplit
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics (none where no right answer is known), and what they are of (`answer`)."""
        arrays = self.answer(variables, split)
        return question_metrics(arrays["outcome"], arrays["judged"], split), arrays


def answer_scores(features: Features, kind: str, ranking: str = "logit") -> Float[Array, "b k"]:
    """What the choices are ranked by, float32: VCR's by `ranking`, all others the model's logits.

    Raises:
      ValueError: the model gives no logits.
    """
    said = (getattr(features, "outputs", None) or {}).get(kind)
    if kind == "vcr" and said is not None and said.shape[-1] == 2:
        return jnp.asarray(choice_scores(said, ranking), jnp.float32)
    if features.logits is None:
        raise ValueError("the model answers no questions: it gives no logits")
    return features.logits.astype(jnp.float32)


def question_metrics(
    outcome: Float[np.ndarray, " n"], judged: Bool[np.ndarray, " n"], split: QuestionSplit
) -> dict[str, float]:
    """Accuracies in percent over the judged items, and over those of each category: "accuracy/why".

    "accuracy" is of all items. For VCR there are also "Q->A" and "QA->R", of the items of a kind, and
    "Q->AR", of the records with both: right where both are (Zellers et al. 2019, section 5).

    Raises:
      ValueError: a record has two judged items of one kind.
    """
    made = _percent("accuracy", outcome[judged], split.categories[judged])
    rights: list[dict[str, tuple[float, str]]] = []
    for name, kind in VCR_METRICS.items():
        items = np.flatnonzero(judged & (split.kinds == kind))
        made |= _percent(name, outcome[items], split.categories[items])
        found = {str(split.record_ids[i]): (float(outcome[i]), str(split.categories[i])) for i in items}
        if len(found) < len(items):
            raise ValueError(f"{len(items) - len(found)} records have several {name} questions with a label")
        rights.append(found)
    first, second = rights
    both = [(right * second[record][0], kind) for record, (right, kind) in first.items() if record in second]
    outcomes, categories = np.array([x for x, _ in both]), np.array([kind for _, kind in both])
    return made | _percent("Q->AR", outcomes, categories)


def _percent(name: str, outcome: np.ndarray, categories: np.ndarray) -> dict[str, float]:
    if not len(outcome):
        return {}
    made = {name: float(100 * outcome.astype(np.float64).mean())}
    split = by_category(outcome.astype(np.float32), [str(category) for category in categories])
    return made | {f"{name}/{key}": 100 * right / count for key, (right, count) in split.items() if key}


def _in_order(parts: Sequence[dict[str, np.ndarray]], total: int) -> dict[str, np.ndarray]:
    """The rows of all batches, by example_id.

    Raises:
      ValueError: an item is missing, occurs twice or is none of the split's.
    """
    ids = np.concatenate([np.zeros(0, np.int32), *(part["example_id"] for part in parts)])
    counts = np.bincount(ids[(ids >= 0) & (ids < total)], minlength=total)
    if not total or len(ids) != total or (counts != 1).any():
        raise ValueError(
            f"the batches should bring each of the split's {total} questions once: "
            f"{int((counts == 0).sum())} are missing, {int((counts > 1).sum())} occur several times, "
            f"{len(ids) - int(counts.sum())} are not of the split"
        )
    order = np.argsort(ids)
    names = [name for name in parts[0] if name != "example_id"]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}
