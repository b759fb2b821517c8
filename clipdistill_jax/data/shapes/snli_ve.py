"""Stills as an SNLI-VE tree: hypotheses that an image entails, contradicts or leaves open.

A hypothesis names a role. It is open where it fits a person without a hat, whose role nobody can see; so the
same words can have any label. The shortcut of the real hypotheses, words that come with a label, is planted
at a set rate: each ends with a phrase that says nothing, mostly the one of its label.
"""

from __future__ import annotations

import random
from pathlib import Path

from clipdistill_jax.data.formats.snli_ve import FILES, IMAGE_FIELDS, IMAGE_FOLDERS, LABELS
from clipdistill_jax.data.regions.uniter import flickr_name
from clipdistill_jax.data.shapes.sayings import SPOT, captions, predicate
from clipdistill_jax.data.shapes.scenes import DOMAINS, ROLES, UNKNOWN_ROLE, Claim, SceneConfig, Still
from clipdistill_jax.data.shapes.stills_tree import Picture, Plan, draw_stills, json_lines, write_stills

ENDINGS = {"contradiction": "right now", "entailment": "outside", "neutral": "today"}


def write_snli_ve(folder: str | Path, config: SceneConfig, workers: int | None = None) -> Path:
    """Writes stills as an SNLI-VE tree with region features in regions/, see `write_stills`.

    Labels take turns. Every image shows a person with a hat and one without.
    """
    return write_stills(folder, config, _plan, format="snli_ve", workers=workers)


def entailment_label(still: Still, claim: Claim) -> str:
    """One of LABELS for a claim with a role."""
    if still.is_true(claim):
        return "entailment"
    return "neutral" if still.is_true(claim | {"role": UNKNOWN_ROLE}) else "contradiction"


def _plan(config: SceneConfig) -> Plan:
    pictures, texts, number = [], {}, 0
    for split, stills in draw_stills(config, "snli_ve", _one_hat).items():
        records: list[dict] = []
        for still in stills:
            image, number = f"{1_000_000 + number}.jpg", number + 1
            pictures.append(
                Picture(
                    still, f"{IMAGE_FOLDERS[0]}/{image}", detected=flickr_name(image.removesuffix(".jpg"))
                )
            )
            for k in range(config.questions):
                label = LABELS[len(records) % len(LABELS)]
                rng = random.Random(f"{still.seed}/snli_ve/{k}")
                records.append(
                    {
                        IMAGE_FIELDS[0]: image,
                        "pairID": f"{image}#{k}r1{label[0]}",
                        "gold_label": label,
                        "sentence1": captions(still, 1, partial=False)[0],
                        "sentence2": _hypothesis(still, label, config, rng),
                    }
                )
        texts[FILES[split]] = json_lines(records)
    return pictures, texts


def _one_hat(still: Still) -> bool:
    return len(still.people) == 2 and sum(p.role == UNKNOWN_ROLE for p in still.people) == 1


def _hypothesis(still: Still, label: str, config: SceneConfig, rng: random.Random) -> str:
    claim = _claim(still, label, rng)
    noun = f"a {claim['role']}" + (f" in {claim['shirt']}" if "shirt" in claim else "")
    where = f" {SPOT[claim['spot']]}" if "spot" in claim else ""
    others = [ENDINGS[other] for other in LABELS if other != label]
    ending = ENDINGS[label] if rng.random() < config.shortcut_rate else rng.choice(others)
    return f"{noun} {predicate('does', claim, rng)}{where} {ending} ."


def _claim(still: Still, label: str, rng: random.Random) -> Claim:
    """What the hypothesis claims: all of it true, or its role open, or something of it false."""
    names = ["role", "verb", "colour", "item"]
    names += [name for name, share in (("shirt", 0.6), ("spot", 0.3)) if rng.random() < share]
    while True:
        facts = still.facts(rng.choice(still.people))
        claim = {name: facts[name] for name in names}
        if claim["role"] == UNKNOWN_ROLE:
            claim["role"] = rng.choice(ROLES)
        if label == "contradiction":
            name = rng.choice(names)
            claim[name] = rng.choice(DOMAINS[name])
        if entailment_label(still, claim) == label:
            return claim
