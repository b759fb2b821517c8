"""Still scenes for questions about images: who is there, what they do, and whether a claim on them is true.

A scene has one or two people and one to three things, at most four in all. A person has a role that a hat
shows (or no hat: then the role cannot be told), a shirt, and does one of three things to a thing of their
own. Further things lie about. Colours of shirts and of things have no name in common.

Whether a scene is of the train, the validation or the test split is a function of the scene alone: no scene
of a training split, of whatever tree and seed, is in a held-out split of another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Sequence

from clipdistill_jax.data.shapes.world import COLOURS

SHIRTS = {"orange": (240, 140, 30), "purple": (140, 60, 170), "black": (30, 30, 35), "white": (245, 245, 245)}
ITEMS = {"ball": "circle", "box": "square", "cone": "triangle"}  # class of a thing -> its outline
ROLES = ("cook", "farmer", "guard")
UNKNOWN_ROLE = "person"  # of somebody without a hat
VERBS = ("hold", "point", "lift")
PLACES = ("beach", "field", "street", "snow")
SPOTS = ("left", "middle", "right")
SPLITS = ("train", "validation", "test")
_HELD_OUT = {"validation": 0.15, "test": 0.15}  # shares of all scenes
_TRIES = 20_000

# What a claim can speak of, and the values that it can give.
DOMAINS: dict[str, tuple[str, ...]] = {
    "verb": VERBS,
    "colour": tuple(COLOURS),
    "item": tuple(ITEMS),
    "role": ROLES,
    "shirt": tuple(SHIRTS),
    "place": PLACES,
    "spot": SPOTS,
}
Claim = dict[str, str]  # attribute -> value, of one person (or thing)


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Sizes of a tree of stills."""

    train: int = 2000  # images
    validation: int = 256
    test: int = 256
    questions: int = 3  # an image
    captions: int = 3  # a training image
    shortcut_rate: float | int = 0.65  # how often the words alone point to the right answer
    annotator_noise: float | int = 0.15  # how often one of VQA's ten people says something else
    size: int = 64  # pixels a side
    noise: float | int = 6.0  # standard deviation, of 255
    region_width: int = 48  # 3 s s: a region's features are its pixels, s a side
    region_noise: float | int = 0.1  # of features that lie in -1 to 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "questions", "captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("shortcut_rate", "annotator_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a fraction, 0 to 1")
        if self.size < 32:
            raise ValueError(f"size={self.size}: below 32 pixels nobody can tell who does what")
        if self.region_width != 3 * self.region_side**2 or self.region_width < 3:
            raise ValueError(f"region_width={self.region_width} must be 3 s s: 3, 12, 27, 48, 75, ...")

    @property
    def region_side(self) -> int:
        """Pixels a side that a region is shrunk to."""
        return math.isqrt(max(self.region_width, 0) // 3)


@dataclasses.dataclass(frozen=True, order=True)
class Item:
    """A thing; `spot` is where it lies, "" where a person has to do with it."""

    colour: str
    item: str
    spot: str = ""


_EVERY_ITEM = tuple(Item(colour, item) for colour in COLOURS for item in ITEMS)


@dataclasses.dataclass(frozen=True, order=True)
class Person:
    """A person and what they do to a thing of theirs."""

    role: str
    shirt: str
    verb: str
    spot: str
    own: Item


@dataclasses.dataclass(frozen=True)
class Still:
    """One image; `seed` is that of all that is not described."""

    place: str
    people: tuple[Person, ...]
    lying: tuple[Item, ...]
    seed: int

    @property
    def key(self) -> tuple:
        """All that can be said of the scene."""
        return self.place, tuple(sorted(self.people)), tuple(sorted(self.lying))

    @property
    def items(self) -> tuple[Item, ...]:
        return (*(person.own for person in self.people), *self.lying)

    @property
    def objects(self) -> tuple[Person | Item, ...]:
        """People and things in an order that says nothing of who has to do with what."""
        listed: list[Person | Item] = [*self.people, *self.items]
        random.Random(f"{self.seed}/objects").shuffle(listed)
        return tuple(listed)

    def facts(self, person: Person) -> Claim:
        """All that is true of a person."""
        own = {"colour": person.own.colour, "item": person.own.item}
        looks = {"role": person.role, "shirt": person.shirt, "verb": person.verb}
        return {**own, **looks, "place": self.place, "spot": person.spot}

    def is_true(self, claim: Claim) -> bool:
        """Whether some person is as the claim says.

        Without a verb the claim's thing may be any: all of them are near.
        """
        things = [{}] if "verb" in claim else [{"colour": i.colour, "item": i.item} for i in self.items]
        return any(
            claim.items() <= (self.facts(person) | thing).items()
            for person in self.people
            for thing in things
        )

    @property
    def split(self) -> str:
        """The split that the scene belongs to, in any tree."""
        digest = hashlib.sha256(repr(self.key).encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for name, share in _HELD_OUT.items():
            if place < share:
                return name
            place -= share
        return "train"


def class_name(thing: Person | Item) -> str:
    """What a detector calls it."""
    return "person" if isinstance(thing, Person) else thing.item


def draw_still(
    rng: random.Random, split: str, taken: set[tuple], fits: Callable[[Still], bool] = lambda still: True
) -> Still:
    """A scene of a split; scenes of held-out splits are all different.

    Args:
      rng: decides.
      taken: keys of the held-out scenes so far; gets this one's.
      fits: what the scene must be like.

    Raises:
      ValueError: no scene like that was found.
    """
    for _ in range(_TRIES):
        still = _draw(rng)
        if fits(still) and still.split == split and still.key not in taken:
            if split != "train":
                taken.add(still.key)
            return still
    raise ValueError(f"no further scene of the {split} split was found: ask for fewer images")


def alternatives(
    still: Still, claim: Claim, pairs: Sequence[tuple[str, str]], rng: random.Random
) -> list[Claim]:
    """Four claims: a true one, and it with one or both of two attributes changed, false of everybody.

    As each of two values occurs twice, the words of the four say nothing of which is true.

    Args:
      still: the scene.
      claim: true in it.
      pairs: attributes to change, one of the pairs; the claim has them.
      rng: decides.

    Raises:
      ValueError: every change of the attributes makes something true.
    """
    changes = [(pair, a, b) for pair in pairs for a in DOMAINS[pair[0]] for b in DOMAINS[pair[1]]]
    rng.shuffle(changes)
    for (first, second), a, b in changes:
        false = [claim | {first: a}, claim | {second: b}, claim | {first: a, second: b}]
        if claim[first] != a and claim[second] != b and not any(still.is_true(c) for c in false):
            return [claim, *false]
    raise ValueError(f"{claim} cannot be changed in {pairs}: each change is true of {still}")


def _draw(rng: random.Random) -> Still:
    count = rng.choice((1, 1, 2))
    spots = rng.sample(SPOTS, 3)
    lying = rng.choice((0, 1, 2)) if count == 1 else 0
    items = rng.sample(_EVERY_ITEM, count + lying)
    people = [
        Person(rng.choice((*ROLES, UNKNOWN_ROLE)), shirt, rng.choice(VERBS), spot, own)
        for shirt, spot, own in zip(rng.sample(list(SHIRTS), count), spots, items, strict=False)
    ]
    rest = [
        dataclasses.replace(item, spot=spot) for item, spot in zip(items[count:], spots[count:], strict=False)
    ]
    return Still(rng.choice(PLACES), tuple(people), tuple(rest), rng.getrandbits(32))
