"""What happens in a clip and what people say of it."""

from __future__ import annotations

import dataclasses
import itertools
import random

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
}
SHAPES = ("circle", "square", "triangle")
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Where a still object rests; x to the right and y down, in sides of the frame.
PLACES = {
    "at the top left": (0.2, 0.2),
    "at the top": (0.5, 0.2),
    "at the top right": (0.8, 0.2),
    "on the left": (0.2, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.8, 0.5),
    "at the bottom left": (0.2, 0.8),
    "at the bottom": (0.5, 0.8),
    "at the bottom right": (0.8, 0.8),
}
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}

SYNONYMS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "left": ("moves left", "goes left", "slides left"),
    "right": ("moves right", "goes right", "slides right"),
    "up": ("moves up", "rises", "climbs"),
    "down": ("moves down", "falls", "sinks"),
    "grow": ("grows", "gets bigger", "expands"),
    "shrink": ("shrinks", "gets smaller", "contracts"),
    "something": ("thing", "object", "shape"),
    "still": ("rests", "stays"),
}
# How often a training caption that leaves things out names each attribute of an object.
NAMED = {"colour": 0.6, "shape": 0.6, "motion": 0.95}
_KINDS = {**dict.fromkeys(STEPS, "direction"), "grow": "size", "shrink": "size", "turn": "colour"}
_TURN = ("turns from {} to {}", "changes from {} to {}", "goes from {} to {}")
_JOIN = (" and ", " while ", " as ")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene.

    `motion` is a tuple of words: ("left",), ("left", "up") for one after the other, ("grow",),
    ("still", place), or ("turn", colour) for a change of colour halfway.
    """

    colour: str
    shape: str
    motion: tuple[str, ...]

    def reversed(self) -> Thing:
        """The same object when the clip is played backwards."""
        if self.motion[0] == "still":
            return self
        if self.motion[0] == "turn":
            return dataclasses.replace(self, colour=self.motion[1], motion=("turn", self.colour))
        back = tuple(_OPPOSITE.get(word, word) for word in reversed(self.motion))
        return dataclasses.replace(self, motion=back)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip: its objects, the seed of all that is not described, and whether it plays backwards."""

    video_id: str
    things: tuple[Thing, ...]
    seed: int
    backwards: bool = False

    def described(self) -> tuple[Thing, ...]:
        """The objects as a viewer of this clip sees them."""
        return tuple(thing.reversed() for thing in self.things) if self.backwards else self.things

    def twin(self) -> Scene:
        """The clip with the same frames in reverse order."""
        return dataclasses.replace(self, backwards=not self.backwards)


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Sizes of the world. `train` clips serve the teacher, the first `train_small` of them the student."""

    train: int = 6000
    train_small: int = 600
    validation: int = 256
    test: int = 512  # of which twins: 2 * twin_pairs
    twin_pairs: int = 128
    captions: int = 4  # a training clip
    size: int = 32  # pixels a side
    fps: int = 2
    seconds: int = 2  # frames at 0, 1, .. seconds, so one more than this at one frame a second
    noise: float = 10.0  # standard deviation, of 255
    seed: int = 0


def _motion(rng: random.Random, colour: str) -> tuple[str, ...]:
    kind = rng.choices(("one", "two", "grow", "turn", "still"), (8, 1, 2, 1, 2))[0]
    if kind == "one":
        return (rng.choice(list(STEPS)),)
    if kind == "two":
        first = rng.choice(list(STEPS))
        across = ("up", "down") if first in ("left", "right") else ("left", "right")
        return (first, rng.choice(across))
    if kind == "grow":
        return (rng.choice(("grow", "shrink")),)
    if kind == "turn":
        return ("turn", rng.choice([other for other in COLOURS if other != colour]))
    return ("still", rng.choice(list(PLACES)))


def _things(rng: random.Random, crowd: tuple[int, int, int], still: float) -> tuple[Thing, ...]:
    """One, two or three objects (weighted by `crowd`) of different colours; all at rest in a `still` part."""
    colours = rng.sample(list(COLOURS), rng.choices((1, 2, 3), crowd)[0])
    if rng.random() < still:
        motions: list[tuple[str, ...]] = [("still", p) for p in rng.sample(list(PLACES), len(colours))]
    else:
        motions = [_motion(rng, colour) for colour in colours]
    return tuple(Thing(c, rng.choice(SHAPES), m) for c, m in zip(colours, motions, strict=True))


def scenes(config: WorldConfig) -> dict[str, list[Scene]]:
    """Scenes of every split.

    No two clips of the validation and test splits, twins included, fit the same full description, and no
    training clip fits one of theirs. Training clips may be alike, as clips of the web are. In four of ten
    of them nothing moves and the captions say where things are: without these, what a direction is takes a
    model many times as long to learn.
    """
    rng = random.Random(config.seed)
    held_out: set[tuple] = set()
    numbers = itertools.count()

    def draw(twins: bool, keep: bool) -> list[Scene]:
        while True:
            # There are few scenes of one object; holding many of them out would leave none to learn from.
            things = _things(rng, (1, 6, 2), 0.0) if keep else _things(rng, (8, 5, 1), 0.4)
            scene = Scene("", things, rng.getrandbits(32))
            made = [scene, scene.twin()] if twins else [scene]
            keys = {tuple(sorted(dataclasses.astuple(t) for t in s.described())) for s in made}
            if len(keys) == len(made) and not held_out & keys:
                held_out.update(keys if keep else ())
                return [dataclasses.replace(s, video_id=f"video{next(numbers)}") for s in made]

    def split(pairs: int, total: int) -> list[Scene]:
        drawn = [draw(True, True) for _ in range(pairs)] + [
            draw(False, True) for _ in range(total - 2 * pairs)
        ]
        return [scene for some in drawn for scene in some]

    test = split(config.twin_pairs, config.test)
    validation = split(0, config.validation)
    train = [draw(False, False)[0] for _ in range(config.train)]
    return {"train": train, "validation": validation, "test": test}


def describe(thing: Thing, rng: random.Random, partial: bool = False) -> str:
    """One object in words: all of its attributes, or (partial) each with the chance in `NAMED`."""

    def say(word: str) -> str:
        return rng.choice(SYNONYMS[word])

    def named(attribute: str) -> bool:
        return not partial or rng.random() < NAMED[attribute]

    words = []
    if named("colour") and thing.motion[0] != "turn":
        words.append(say(thing.colour))
    words.append(say(thing.shape if named("shape") else "something"))
    if named("motion"):
        if thing.motion[0] == "turn":
            words.append(rng.choice(_TURN).format(say(thing.colour), say(thing.motion[1])))
        elif thing.motion[0] == "still":
            words.append(f"{say('still')} {thing.motion[1]}")
        else:
            words.append(" and then ".join(say(word) for word in thing.motion))
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def caption(scene: Scene, rng: random.Random, partial: bool) -> str:
    """A sentence on the clip: of some objects with some attributes (partial) or of everything."""
    things = list(scene.described())
    rng.shuffle(things)
    if partial:
        things = things[: rng.randint(1, len(things))]
    return rng.choice(_JOIN).join(describe(thing, rng, partial) for thing in things)


def captions(scene: Scene, count: int, partial: bool) -> list[str]:
    """`count` sentences on the clip, a pure function of the scene."""
    rng = random.Random(f"{scene.seed}/{scene.backwards}/captions")
    return [caption(scene, rng, partial) for _ in range(count)]


def motion_kind(scene: Scene) -> str:
    """What tells a twin from its original: "direction", "order", "size" or "colour" of the events."""
    kinds = {
        "order" if len(thing.motion) == 2 and thing.motion[0] != "turn" else _KINDS[thing.motion[0]]
        for thing in scene.things
        if thing.motion[0] != "still"
    }
    return kinds.pop() if len(kinds) == 1 else "several"
