"""What people say of still scenes. Captions, answers and hypotheses are made of the same phrases."""

from __future__ import annotations

import random

from clipdistill_jax.data.shapes.scenes import UNKNOWN_ROLE, Claim, Item, Person, Still

SOMEONE = "someone"
PLACE = {"beach": "at the beach", "field": "in the field", "street": "in the street", "snow": "in the snow"}
SPOT = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
# No word here is also the colour of a shirt or thing that is named beside it.
_HAT = {"cook": "a tall white hat", "farmer": "a wide straw hat", "guard": "a flat dark cap"}
_GROUND = {"beach": "yellow sand", "field": "green grass", "street": "grey stone", "snow": "cold snow"}

# What a person does to a thing, in each form of speech; the first is what the pixels show.
ACTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "does": {
        "hold": ("holds", "carries"),
        "point": ("points at", "reaches for"),
        "lift": ("lifts", "raises"),
    },
    "will": {"hold": ("will throw",), "point": ("will take",), "lift": ("will drop",)},
    "feels": {"hold": ("likes",), "point": ("wants",), "lift": ("is proud of",)},
    "purpose": {"hold": ("is here to bring",), "point": ("is here to find",), "lift": ("is here to show",)},
    "would": {"hold": ("would lose",), "point": ("would miss",), "lift": ("would break",)},
}
# The attributes that each form speaks of.
ATTRIBUTES: dict[str, tuple[str, ...]] = dict.fromkeys(ACTIONS, ("verb", "colour", "item")) | {
    "looks": ("role", "shirt"),
    "where": ("place", "spot"),
    "near": ("shirt", "colour", "item"),
    "hat": ("role", "colour", "item"),
    "ground": ("place", "shirt"),
}
# How often a training caption uses each form.
_WEIGHTS = {"does": 12, "will": 3, "feels": 3, "purpose": 3, "would": 3}
_WEIGHTS |= {"looks": 3, "where": 4, "near": 2, "hat": 3, "ground": 2}


def predicate(form: str, claim: Claim, rng: random.Random) -> str:
    """What is said of a person, e.g. "holds a red ball".

    Args:
      form: a key of ATTRIBUTES.
      claim: has the form's attributes.
      rng: chooses between synonyms.
    """
    thing = f"a {claim['colour']} {claim['item']}" if "item" in claim else ""
    if form in ACTIONS:
        return f"{rng.choice(ACTIONS[form][claim['verb']])} {thing}"
    if form == "looks":
        return f"is a {claim['role']} in {claim['shirt']}"
    if form == "where":
        return f"stands {SPOT[claim['spot']]} {PLACE[claim['place']]}"
    if form == "near":
        return f"is in {claim['shirt']} near {thing}"
    if form == "hat":
        return f"wears {_HAT[claim['role']]} near {thing}"
    return f"stands on {_GROUND[claim['place']]} in {claim['shirt']}"


def captions(still: Still, count: int, partial: bool) -> list[str]:
    """`count` sentences on some of the scene, or (not partial) on all of it; a function of the scene."""
    rng = random.Random(f"{still.seed}/captions")
    return [_partial(still, rng) if partial else _telling(still, rng) for _ in range(count)]


def _who(person: Person, rng: random.Random, role: float = 0.7, shirt: float = 0.6) -> str:
    known = person.role != UNKNOWN_ROLE
    noun = f"a {person.role}" if known and rng.random() < role else rng.choice((SOMEONE, "a person"))
    return noun + (f" in {person.shirt}" if rng.random() < shirt else "")


def _partial(still: Still, rng: random.Random) -> str:
    people = rng.sample(still.people, rng.randint(1, len(still.people)))
    said = [_sentence(still, person, rng) for person in people]
    said += [_lies(item) for item in still.lying if rng.random() < 0.3]
    return " and ".join(said)


def _sentence(still: Still, person: Person, rng: random.Random) -> str:
    forms = [f for f in _WEIGHTS if f not in ("looks", "hat") or person.role != UNKNOWN_ROLE]
    form = rng.choices(forms, [_WEIGHTS[f] for f in forms])[0]
    tells = set(ATTRIBUTES[form])
    who = _who(person, rng, 0.0 if "role" in tells else 0.7, 0.0 if "shirt" in tells else 0.6)
    words = [who, predicate(form, still.facts(person), rng)]
    if form in ACTIONS:
        words += [SPOT[person.spot]] * (rng.random() < 0.3) + [PLACE[still.place]] * (rng.random() < 0.3)
    return " ".join(words)


def _telling(still: Still, rng: random.Random) -> str:
    said = []
    for person in rng.sample(still.people, len(still.people)):
        noun = f"a {person.role} in {person.shirt}"
        said.append(f"{noun} {predicate('does', still.facts(person), rng)} {SPOT[person.spot]}")
    said += [_lies(item) for item in still.lying]
    return f"{' and '.join(said)} {PLACE[still.place]}"


def _lies(item: Item) -> str:
    return f"a {item.colour} {item.item} lies {SPOT[item.spot]}"
