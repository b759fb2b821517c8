"""Stills as a VCR tree: questions of the seven categories, with four answers and four rationales each.

Of four choices, each value of two attributes occurs in two, so that their words do not tell the right one.
What does, at a set rate, is the shortcut of the real questions: the right choice repeats the question's
person tag more often than the wrong ones do, which say "someone".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from clipdistill_jax.data.formats.vcr import FILES, IMAGES
from clipdistill_jax.data.regions.uniter import vcr_names
from clipdistill_jax.data.shapes.sayings import ACTIONS, ATTRIBUTES, SOMEONE, predicate
from clipdistill_jax.data.shapes.scenes import (
    UNKNOWN_ROLE,
    Claim,
    Person,
    SceneConfig,
    Still,
    alternatives,
    class_name,
)
from clipdistill_jax.data.shapes.stills_tree import Picture, Plan, draw_stills, json_lines, write_stills

# Category -> question about the person that stands for {}, and the form of its answers.
_QUESTIONS = {
    "explanation": ("Why is {} here ?", "purpose"),
    "activity": ("What is {} doing ?", "does"),
    "temporal": ("What happens next to {} ?", "will"),
    "mental": ("How does {} feel ?", "feels"),
    "role": ("Who is {} ?", "looks"),
    "scene": ("Where is {} ?", "where"),
    "hypothetical": ("What would happen if {} left ?", "would"),
}
# Form of the answers -> the attributes that tell them apart, two at a time.
_PAIRS = dict.fromkeys(ACTIONS, (("verb", "colour"), ("verb", "item"), ("colour", "item"))) | {
    "looks": (("role", "shirt"),),
    "where": (("place", "spot"),),
}
# The same for the rationales: form, and pairs of what the answer says and what only the image says.
_REASONS = dict.fromkeys(ACTIONS, ("near", (("colour", "shirt"), ("item", "shirt")))) | {
    "looks": ("hat", (("role", "colour"), ("role", "item"))),
    "where": ("ground", (("place", "shirt"),)),
}
_MOVIE = "lsmdc_stills"

Words = list[str | list[int]]


def write_vcr(folder: str | Path, config: SceneConfig, workers: int | None = None) -> Path:
    """Writes stills as a VCR tree with region features in regions/, see `write_stills`.

    The seven categories take turns. The test split has no labels. Given the right answer, words rule out two
    of the four rationales; between the others the image decides.
    """
    return write_stills(folder, config, _plan, format="vcr", workers=workers)


def _plan(config: SceneConfig) -> Plan:
    pictures, texts, number = [], {}, 0
    for split, stills in draw_stills(config, "vcr", _has_role).items():
        records: list[dict] = []
        for still in stills:
            name = f"{_MOVIE}/{number:06d}@0"
            number += 1
            ground_truth, detected = vcr_names(split, Path(f"{name}.jpg"))
            image, metadata = f"{IMAGES}/{name}.jpg", f"{IMAGES}/{name}.json"
            pictures.append(Picture(still, image, metadata, ground_truth, detected))
            files = {"movie": _MOVIE, "img_fn": f"{name}.jpg", "metadata_fn": f"{name}.json"}
            for k in range(config.questions):
                category = list(_QUESTIONS)[len(records) % len(_QUESTIONS)]
                rng = random.Random(f"{still.seed}/vcr/{k}")
                stem = FILES[split].removesuffix(".jsonl")
                record = {
                    "annot_id": f"{stem}-{len(records)}",
                    **files,
                    **_question(still, category, config, rng),
                }
                if split == "test":
                    del record["answer_label"], record["rationale_label"]
                records.append(record)
        texts[FILES[split]] = json_lines(records)
    return pictures, texts


def _has_role(still: Still) -> bool:
    return any(person.role != UNKNOWN_ROLE for person in still.people)


def _question(still: Still, category: str, config: SceneConfig, rng: random.Random) -> dict:
    text, form = _QUESTIONS[category]
    person = rng.choice([p for p in still.people if form != "looks" or p.role != UNKNOWN_ROLE])
    tag = [still.objects.index(person)]
    asked = tag
    if category == "explanation" and len(still.people) == 2:  # of both, with one tag
        text, asked = text.replace(" is ", " are "), sorted(still.objects.index(p) for p in still.people)
    reason, pairs = _REASONS[form]
    answers, answer = _choices(still, person, form, _PAIRS[form], tag, config, rng)
    rationales, rationale = _choices(still, person, reason, pairs, tag, config, rng)
    return {
        "objects": [class_name(thing) for thing in still.objects],
        "question": [asked if word == "{}" else word for word in text.split()],
        "answer_choices": answers,
        "answer_label": answer,
        "rationale_choices": rationales,
        "rationale_label": rationale,
    }


def _choices(
    still: Still,
    person: Person,
    form: str,
    pairs: Sequence[tuple[str, str]],
    tag: list[int],
    config: SceneConfig,
    rng: random.Random,
) -> tuple[list[Words], int]:
    """Four texts in an order drawn at random, and which of them is right."""
    facts = still.facts(person)
    claims = alternatives(still, {name: facts[name] for name in ATTRIBUTES[form]}, pairs, rng)
    synonym = rng.getrandbits(32)  # the same word in all of them
    order = rng.sample(range(4), 4)
    choices = []
    for k in order:
        shared = rng.random() < (config.shortcut_rate if k == 0 else 1 - config.shortcut_rate)
        choices.append(_text(tag if shared else SOMEONE, form, claims[k], synonym))
    return choices, order.index(0)


def _text(subject: str | list[int], form: str, claim: Claim, synonym: int) -> Words:
    return [subject, *predicate(form, claim, random.Random(synonym)).split(), "."]
