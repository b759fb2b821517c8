"""From a still scene to pixels, and where in them each person and thing is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

from clipdistill_jax.data.shapes.drawing import coverage
from clipdistill_jax.data.shapes.scenes import ITEMS, SHIRTS, Item, Person, SceneConfig, Still
from clipdistill_jax.data.shapes.world import COLOURS

# x to the right and y down, in sides of the image.
_HORIZON = 0.62
_SKY = (150, 185, 215)
_GROUND = {
    "beach": (205, 180, 120),
    "field": (95, 140, 75),
    "street": (115, 115, 115),
    "snow": (225, 228, 232),
}
_SEA = (50, 105, 150)
_SKIN, _LEGS = (230, 180, 140), (70, 60, 60)
_COLUMN = {"left": 0.23, "middle": 0.5, "right": 0.77}
_LYING = {"left": 0.12, "middle": 0.5, "right": 0.88}
_REACH, _RADIUS = 0.155, 0.08
_SHOULDER, _HAND, _FEET, _OVERHEAD = 0.57, 0.64, 0.88, 0.17  # heights
# Hats as boxes x1, y1, x2, y2 from the middle of the head.
_HATS = {
    "cook": ((245, 245, 245), ((-0.065, -0.19, 0.065, -0.04),)),
    "farmer": ((215, 170, 60), ((-0.13, -0.075, 0.13, -0.035), (-0.06, -0.12, 0.06, -0.07))),
    "guard": ((25, 40, 110), ((-0.08, -0.09, 0.08, -0.03),)),
}


Number = float | int
Point = tuple[Number, Number]
Tint = Callable[..., np.ndarray]  # a colour, a little off


class _Canvas:
    """Pixels, and the extent of what was painted since `begin`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.y, self.x = (np.mgrid[0:size, 0:size] + 0.5) / size
        self.pixels = np.zeros((size, size, 3))
        self.begin()

    def begin(self) -> None:
        self.touched = np.zeros((self.size, self.size), bool)

    def paint(self, inside: np.ndarray, colour: np.ndarray) -> None:
        """`inside` is the signed closeness to the outline in sides, positive inside."""
        alpha = np.clip(0.5 + inside * self.size, 0, 1)[..., None]
        self.pixels = self.pixels * (1 - alpha) + colour * alpha
        self.touched |= alpha[..., 0] >= 0.5

    def box(self, x1: Number, y1: Number, x2: Number, y2: Number, colour: np.ndarray) -> None:
        self.paint(np.minimum.reduce([self.x - x1, x2 - self.x, self.y - y1, y2 - self.y]), colour)

    def shape(self, shape: str, x: Number, y: Number, radius: Number, colour: np.ndarray) -> None:
        self.paint(coverage(shape, (self.x - x) / radius, (self.y - y) / radius) * radius, colour)

    def line(self, start: Point, end: Point, colour: np.ndarray) -> None:
        points = np.stack([self.x, self.y], -1) - start
        way = np.subtract(end, start)
        along = np.clip(points @ way / (way @ way), 0, 1)
        self.paint(0.022 - np.linalg.norm(points - along[..., None] * way, axis=-1), colour)

    def extent(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 in pixels of what was painted."""
        rows, columns = (np.flatnonzero(self.touched.any(axis)) for axis in (1, 0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def paint(
    still: Still, config: SceneConfig
) -> tuple[UInt8[np.ndarray, "side side 3"], Float32[np.ndarray, "n 4"]]:
    """The image, and x1, y1, x2, y2 in pixels of each of `still.objects`."""
    rng = np.random.default_rng(still.seed)

    def tint(colour: tuple[int, int, int], spread: Number = 12) -> np.ndarray:
        return np.array(colour, float) + rng.uniform(-spread, spread, 3)

    canvas = _Canvas(config.size)
    canvas.box(-1, -1, 2, 2, tint(_SKY, 20))
    if still.place == "beach":
        canvas.box(-1, _HORIZON - 0.12, 2, 2, tint(_SEA))
    canvas.box(-1, _HORIZON + rng.uniform(-0.02, 0.02), 2, 2, tint(_GROUND[still.place]))
    boxes: dict[Person | Item, tuple[float, float, float, float]] = {}
    for item in still.lying:
        canvas.begin()
        x = _LYING[item.spot] + rng.uniform(-0.03, 0.03)
        canvas.shape(ITEMS[item.item], x, _FEET + 0.01, _RADIUS, tint(COLOURS[item.colour]))
        boxes[item] = canvas.extent()
    for person in still.people:
        x = _COLUMN[person.spot] + rng.uniform(-0.015, 0.015)
        side = _side(still, person, rng)
        canvas.begin()
        _person(canvas, person, x, side, tint)
        boxes[person] = canvas.extent()
        canvas.begin()
        place = {
            "hold": (x + side * _REACH, _HAND),
            "point": (x + side * _REACH, _FEET),
            "lift": (x, _OVERHEAD - 0.06),
        }
        canvas.shape(ITEMS[person.own.item], *place[person.verb], _RADIUS, tint(COLOURS[person.own.colour]))
        boxes[person.own] = canvas.extent()
    noisy = canvas.pixels + rng.normal(0, config.noise, canvas.pixels.shape)
    image = np.clip(noisy, 0, 255).astype(np.uint8)
    return image, np.array([boxes[thing] for thing in still.objects], np.float32)


def _side(still: Still, person: Person, rng: np.random.Generator) -> int:
    """Which hand: the one away from everybody and everything else, or any."""
    either = int(rng.choice((-1, 1)))
    others = {p.spot for p in still.people if p is not person} | {item.spot for item in still.lying}
    if not others:
        return either
    if person.spot == "middle":
        return {frozenset({"left"}): 1, frozenset({"right"}): -1}.get(frozenset(others), either)
    return -1 if person.spot == "left" else 1


def _person(canvas: _Canvas, person: Person, x: Number, side: int, tint: Tint) -> None:
    head, skin = 0.45, tint(_SKIN)
    for leg in (-0.045, 0.045):
        canvas.box(x + leg - 0.027, 0.78, x + leg + 0.027, _FEET + 0.05, tint(_LEGS))
    canvas.box(x - 0.085, 0.53, x + 0.085, 0.79, tint(SHIRTS[person.shirt], 6))
    if person.verb == "lift":
        for hand in (-1, 1):
            canvas.line((x + hand * 0.1, _SHOULDER), (x + hand * 0.085, _OVERHEAD), skin)
    else:
        height = _HAND if person.verb == "hold" else _FEET - 0.1
        canvas.line((x + side * 0.08, _SHOULDER), (x + side * (_REACH - 0.02), height), skin)
        canvas.line((x - side * 0.1, _SHOULDER), (x - side * 0.1, 0.74), skin)
    canvas.shape("circle", x, head, 0.075, skin)
    if person.role in _HATS:
        colour, parts = _HATS[person.role]
        for x1, y1, x2, y2 in parts:
            canvas.box(x + x1, head + y1, x + x2, head + y2, tint(colour, 6))
