"""What a student answers: one question about an image, with its choices, from a record of any dataset."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clipdistill_jax.data.formats.snli_ve import LABELS, SnliVeRecord
from clipdistill_jax.data.formats.vcr import VcrRecord, Words, neutral_names
from clipdistill_jax.data.formats.vqa import VqaRecord
from clipdistill_jax.data.protocol import question_category
from clipdistill_jax.data.vocabulary import AnswerVocabulary

KINDS = ("qa", "qar", "ve", "vqa")


@dataclasses.dataclass(frozen=True)
class Question:
    """An item. VCR's record gives two kinds: "qa", and "qar", which asks for the rationale of an answer.

    A text is words and tags; a tag is a tuple of indices into `objects`. Where there is only one text, it is
    the choice, and no context stands before it.

    Attributes:
      example_id: the record's id; in VCR with "/qa" or "/qar" behind it, "/qar0" to "/qar3" where the right
        answer is unknown and each of the four is supposed in turn.
      record_id: the record's id, which the protocols draw.
      kind: one of KINDS.
      image: index of the image in its split.
      objects: class name of each object.
      names: the same with VL-BERT's neutral names for persons.
      context: what stands before each choice: the question, and the answer supposed.
      choices: four (VCR) or one.
      label: the right choice, SNLI-VE's label, or -1 where it is unknown. VQA has none: see `scores`.
      given: index of the answer in the context, -1 where there is none.
      category: what reports divide by: VCR's question category, SNLI-VE's label, VQA's answer type, or "".
      group: what the protocols draw from (`data.protocol`).
      scores: of VQA's classes, class -> (soft score to learn, official accuracy); None where nobody answered.
    """

    example_id: str
    record_id: str
    kind: str
    image: int
    objects: tuple[str, ...]
    names: tuple[str, ...]
    context: tuple[Words, ...]
    choices: tuple[Words, ...]
    label: int
    given: int
    category: str
    group: str
    scores: dict[int, tuple[float, float]] | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(vars(self), ensure_ascii=False, separators=(",", ":"))


def from_json(data: Mapping[str, Any]) -> Question:
    """What `Question.to_json` wrote, parsed."""
    texts = {name: tuple(map(_words, data[name])) for name in ("context", "choices")}
    scores = data["scores"]
    return Question(
        **{
            **data,
            **texts,
            "objects": tuple(data["objects"]),
            "names": tuple(data["names"]),
            "scores": None if scores is None else {int(k): tuple(v) for k, v in scores.items()},
        }
    )


def vcr_items(record: VcrRecord, image: int) -> Iterator[Question]:
    """ "qa", then "qar" after the right answer, or where that is unknown after each of the four."""
    category = question_category(record.question)

    def item(kind: str, name: str, label: int | None, given: int) -> Question:
        answer = () if given < 0 else (record.answers[given],)
        return Question(
            example_id=f"{record.example_id}/{name}",
            record_id=record.example_id,
            kind=kind,
            image=image,
            objects=record.objects,
            names=neutral_names(record),
            context=(record.question, *answer),
            choices=record.rationales if answer else record.answers,
            label=-1 if label is None else label,
            given=given,
            category=category,
            group=category,
        )

    yield item("qa", "qa", record.answer_label, -1)
    if record.answer_label is not None:
        yield item("qar", "qar", record.rationale_label, record.answer_label)
    else:
        for given in range(len(record.answers)):
            yield item("qar", f"qar{given}", None, given)


def snli_ve_items(record: SnliVeRecord, image: int) -> Iterator[Question]:
    """One item: the hypothesis alone is its text."""
    yield _single(record.example_id, "ve", image, record.hypothesis, record.label, LABELS[record.label])


def vqa_items(record: VqaRecord, image: int, vocabulary: AnswerVocabulary) -> Iterator[Question]:
    """One item: the question alone is its text; the vocabulary's answers are scored, not written out."""
    scores = None
    if record.answers:
        soft, official = vocabulary.targets(record.answers), vocabulary.official(record.answers)
        classes = np.flatnonzero((soft > 0) | (official > 0)).tolist()
        # Of ten people no score has more decimals.
        scores = {k: (round(float(soft[k]), 1), round(float(official[k]), 1)) for k in classes}
    item = _single(record.example_id, "vqa", image, record.question, -1, record.answer_type or "")
    yield dataclasses.replace(item, group="all", scores=scores)


def _single(example_id: str, kind: str, image: int, text: str, label: int, category: str) -> Question:
    return Question(
        example_id=example_id,
        record_id=example_id,
        kind=kind,
        image=image,
        objects=(),
        names=(),
        context=(),
        choices=(tuple(text.split()),),
        label=label,
        given=-1,
        category=category,
        group=category,
    )


def _words(text: list[Any]) -> Words:
    return tuple(item if isinstance(item, str) else tuple(item) for item in text)
