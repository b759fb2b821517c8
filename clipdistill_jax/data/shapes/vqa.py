"""Stills as a VQA v2 tree: open questions with the answers of ten people who now and then err.

Every third question is to be answered with yes or no, every third with a number. The shortcut of the real
questions, answers that are frequent for a question whatever the image, is planted at a set rate.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

from clipdistill_jax.data.formats.vqa import NUM_ANSWERS, SUBSETS
from clipdistill_jax.data.regions.uniter import coco_name
from clipdistill_jax.data.shapes.scenes import DOMAINS, ITEMS, ROLES, SHIRTS, SceneConfig, Still, draw_still
from clipdistill_jax.data.shapes.stills_tree import Picture, Plan, write_stills
from clipdistill_jax.data.vocabulary import normalize_answer

ANSWER_TYPES = ("yes/no", "number", "other")
_VERBS = {"hold": "hold", "point": "point at", "lift": "lift"}
_SPELLED = {"1": "one", "2": "two", "3": "three", "yes": "Yes.", "no": "No"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its possible answers; the first is the right one at `shortcut_rate`."""

    text: str
    type: str
    answers: tuple[str, ...]
    about: tuple[str, str]  # what decides on the answer: kind, value

    def answer(self, still: Still) -> str | None:
        """What the image says; None where the question does not fit it."""
        kind, value = self.about
        if kind == "count":
            return str(len(still.people if value == "people" else still.items))
        if kind == "place":
            return still.place
        if kind == "item":
            found = [i.colour for i in still.items if i.item == value]
        elif kind == "verb":
            found = [p.own.item for p in still.people if p.verb == value]
        else:
            found = [p.role for p in still.people if p.shirt == value]
        return found[0] if len(found) == 1 and found[0] in self.answers else None


def open_questions() -> list[Question]:
    """All questions of the types "number" and "other"; the frequent answers differ within a kind."""

    def turned(values: tuple[str, ...], k: int) -> tuple[str, ...]:
        return values[k % len(values) :] + values[: k % len(values)]

    asked = [
        Question("how many people are there ?", "number", ("1", "2"), ("count", "people")),
        Question("how many things are there ?", "number", ("2", "1", "3"), ("count", "things")),
        Question("where is this ?", "other", DOMAINS["place"], ("place", "")),
    ]
    for k, item in enumerate(ITEMS):
        answers = turned(DOMAINS["colour"], k)
        asked.append(Question(f"what color is the {item} ?", "other", answers, ("item", item)))
    for k, (verb, text) in enumerate(_VERBS.items()):
        answers = turned(tuple(ITEMS), k)
        asked.append(Question(f"what does someone {text} ?", "other", answers, ("verb", verb)))
    for k, shirt in enumerate(SHIRTS):
        asked.append(Question(f"who is in {shirt} ?", "other", turned(ROLES, k), ("shirt", shirt)))
    return asked


def write_vqa(folder: str | Path, config: SceneConfig, workers: int | None = None) -> Path:
    """Writes stills as a VQA v2 tree with region features in regions/, see `write_stills`.

    The test split has no annotations.

    Raises:
      ValueError: more questions an image than there are types; see also `write_stills`.
    """
    if config.questions > len(ANSWER_TYPES):
        raise ValueError(f"questions={config.questions}: a VQA image has at most one of each type, three")
    return write_stills(folder, config, _plan, format="vqa", workers=workers)


def _plan(config: SceneConfig) -> Plan:
    pictures, texts, number = [], {}, 0
    for split, subset in SUBSETS.items():
        rng, taken = random.Random(f"{config.seed}/vqa/{split}"), set[tuple]()
        questions: list[dict] = []
        annotations: list[dict] = []
        for _ in range(getattr(config, split)):
            number += 1
            types = [ANSWER_TYPES[(len(questions) + k) % len(ANSWER_TYPES)] for k in range(config.questions)]
            still, asked = _ask(types, split, taken, config, rng)
            image = f"{subset}/COCO_{subset}_{number:012}.jpg"
            pictures.append(Picture(still, image, detected=coco_name(subset, number)))
            for k, (question, answer) in enumerate(asked):
                ids = {"question_id": 1000 * number + k, "image_id": number}
                questions.append({**ids, "question": question.text})
                annotations.append({**ids, **_annotation(question, answer, config, rng)})
        listed = {"data_subtype": subset, "questions": questions}
        texts[f"v2_OpenEnded_mscoco_{subset}_questions.json"] = json.dumps(listed)
        if split != "test":
            listed = {"data_subtype": subset, "annotations": annotations}
            texts[f"v2_mscoco_{subset}_annotations.json"] = json.dumps(listed)
    return pictures, texts


def _ask(
    types: list[str], split: str, taken: set[tuple], config: SceneConfig, rng: random.Random
) -> tuple[Still, list[tuple[Question, str]]]:
    """A scene and a question of each type on it.

    Open questions and their answers come first, then a scene that fits them: so the answers are exactly as
    frequent as they should be.
    """
    wanted: dict[str, tuple[Question, str]] = {}
    for question in rng.sample(open_questions(), len(open_questions())):
        if question.type in types and question.type not in wanted:
            wanted[question.type] = question, _skewed(question.answers, config, rng)
    still = draw_still(rng, split, taken, lambda s: all(q.answer(s) == a for q, a in wanted.values()))
    return still, [wanted[type] if type in wanted else _yes_no(still, config, rng) for type in types]


def _yes_no(still: Still, config: SceneConfig, rng: random.Random) -> tuple[Question, str]:
    """Whether something is there, someone wears something, does something, or where this is."""
    seen = {f"is there a {i.colour} {i.item} ?" for i in still.items}
    texts = [f"is there a {colour} {item} ?" for colour in DOMAINS["colour"] for item in ITEMS]
    kind = rng.choice(("item", "shirt", "place", "verb"))
    if kind == "shirt":
        seen = {f"is someone in {p.shirt} ?" for p in still.people}
        texts = [f"is someone in {shirt} ?" for shirt in SHIRTS]
    elif kind == "place":
        seen = {f"is this the {still.place} ?"}
        texts = [f"is this the {place} ?" for place in DOMAINS["place"]]
    elif kind == "verb":
        seen = {f"does someone {_VERBS[p.verb]} a {p.own.item} ?" for p in still.people}
        texts = [f"does someone {verb} a {item} ?" for verb in _VERBS.values() for item in ITEMS]
    answers = ("yes", "no")
    answer = _skewed(answers, config, rng)
    text = rng.choice([text for text in texts if (text in seen) == (answer == "yes")])
    return Question(text, "yes/no", answers, (kind, "")), answer


def _skewed(answers: tuple[str, ...], config: SceneConfig, rng: random.Random) -> str:
    """The first answer at `shortcut_rate`, else one of the others."""
    return answers[0] if rng.random() < config.shortcut_rate else rng.choice(answers[1:])


def _annotation(question: Question, answer: str, config: SceneConfig, rng: random.Random) -> dict:
    """Ten people's answers: mostly the right one, now and then spelled otherwise."""
    given = []
    for _ in range(NUM_ANSWERS):
        wrong = [other for other in question.answers if other != answer]
        said = rng.choice(wrong) if rng.random() < config.annotator_noise else answer
        given.append(_SPELLED.get(said, f"the {said}") if rng.random() < 0.2 else said)
    top = Counter(normalize_answer(said) for said in given).most_common(1)[0][0]
    return {
        "question_type": " ".join(question.text.split()[:2]),
        "answer_type": question.type,
        "multiple_choice_answer": top,
        "answers": [
            {"answer": said, "answer_confidence": "yes", "answer_id": k} for k, said in enumerate(given, 1)
        ],
    }
