"""What a scene shows: sampled from (seed, split, index) alone, the same on every machine and Python version.

A scene is one object, two objects in a relation, or two to four of the same. What its caption has to tell (of
one object everything; of two the shapes, colours and relation; of more the shape, colour and number) is its
combination; every combination always belongs to the same split, whatever the seed, so that validation asks for
combinations that training never showed.
"""

import hashlib
import random
from functools import cache
from itertools import combinations
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BACKGROUNDS = ("white", "grey", "black", "sky-blue", "beige")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("single", "pair", "count")
SIZES = {"small": (0.18, 0.22), "large": (0.37, 0.43)}  # of the picture's side
COUNTED_SIZE = (0.20, 0.26)  # objects of a count have no size word: four large ones would not fit
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}  # of the combinations
MARGIN = 0.03


class Thing(NamedTuple):
    """One object: words for shape, colour and size, and its box (centre x, y; side) in 0..1."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    side: float


class Scene(NamedTuple):
    """What one picture shows. `relation` is that of the first thing to the second ("" unless a pair);
    `noise` seeds the pixel noise and the colour jitter."""

    kind: str
    things: tuple[Thing, ...]
    background: str
    relation: str
    noise: int

    @property
    def combination(self) -> tuple:
        looks = [(thing.shape, thing.colour) for thing in self.things]
        if self.kind == "single":
            return ("single", looks[0], self.things[0].size, self.background)
        if self.kind == "count":
            return ("count", looks[0], len(looks))
        first, second = sorted(looks)
        return ("pair", first, second, self.relation if looks[0] == first else INVERSE[self.relation])


class Dice:
    """Random choices built on random() only: the one method whose sequence Python promises to keep."""

    def __init__(self, *key):
        self._random = random.Random(number_of(*key)).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def pick(self, options):
        return options[int(self._random() * len(options))]

    def sample(self, options, count: int) -> list:
        left = list(options)
        return [left.pop(int(self._random() * len(left))) for _ in range(count)]

    def weighted(self, weights: dict[str, float]) -> str:
        point = self._random() * sum(weights.values())
        for option, weight in weights.items():
            point -= weight
            if point < 0:
                return option
        return max(weights, key=weights.get)  # rounding left a sliver at the end


def number_of(*key) -> int:
    """A 64-bit number that depends on the key's text only (Python's hash() differs between processes)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big")


@cache
def combinations_of(kind: str, split: str) -> tuple[tuple, ...]:
    """All combinations of a kind that belong to a split, in a fixed order; no two splits share one."""
    looks = sorted((shape, colour) for shape in SHAPES for colour in COLOURS)
    if kind == "single":
        found = [("single", look, size, background) for look in looks for size in SIZES for background in BACKGROUNDS]
    elif kind == "count":
        found = [("count", look, count) for look in looks for count in (2, 3, 4)]
    else:
        found = [("pair", *pair, relation) for pair in combinations(looks, 2) for relation in RELATIONS]
    return share_of(found, split)


def share_of(combinations: list[tuple], split: str) -> tuple[tuple, ...]:
    """Those of the combinations that belong to a split, whatever their order: SHARES of them, drawn by their text."""
    found = sorted(combinations, key=lambda combination: number_of("combination", combination))
    first_val = round(SHARES["train"] * len(found))
    first_test = round((SHARES["train"] + SHARES["val"]) * len(found))
    bounds = {"train": (0, first_val), "val": (first_val, first_test), "test": (first_test, len(found))}
    return tuple(found[slice(*bounds[split])])


def sample_scene(seed: int, split: str, index: int, kinds: dict[str, float]) -> Scene:
    """Scene number `index` of a split. `kinds`: {kind: weight}."""
    dice = Dice("scene", seed, split, index)
    kind = dice.weighted(kinds)
    combination = dice.pick(combinations_of(kind, split))
    background = combination[3] if kind == "single" else dice.pick(BACKGROUNDS)
    relation = ""
    if kind == "single":
        things = (_place_one(dice, *combination[1:3]),)
    elif kind == "count":
        things = _place_many(dice, *combination[1:])
    else:
        things, relation = _in_telling_order(*_place_two(dice, *combination[1:]))
    return Scene(kind, things, background, relation, number_of("noise", seed, split, index) % 2**32)


def free_centre(dice: Dice, side: float) -> float:
    """A centre at which an object of this side stays inside the margins."""
    return dice.uniform(MARGIN + side / 2, 1 - MARGIN - side / 2)


def _place_one(dice: Dice, look: tuple[str, str], size: str) -> Thing:
    side = dice.uniform(*SIZES[size])
    return Thing(*look, size, free_centre(dice, side), free_centre(dice, side), side)


def _place_two(dice: Dice, look: tuple, other: tuple, relation: str) -> tuple[Thing, Thing, str]:
    """Two things whose boxes are apart along the relation's axis and nearly level across it."""
    sizes = [dice.pick(tuple(SIZES)) for _ in range(2)]
    sides = [dice.uniform(*SIZES[size]) for size in sizes]
    room = 1 - 2 * MARGIN - sum(sides)
    gap = dice.uniform(0.05, min(0.3, room))
    start = MARGIN + dice.uniform(0, room - gap)
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    along = {order[0]: start + sides[order[0]] / 2}
    along[order[1]] = start + sides[order[0]] + gap + sides[order[1]] / 2
    across = [free_centre(dice, max(sides))]
    level = across[0] + dice.uniform(-0.06, 0.06)
    across.append(min(max(level, MARGIN + sides[1] / 2), 1 - MARGIN - sides[1] / 2))
    things = []
    for n, (shape, colour) in enumerate((look, other)):
        x, y = (along[n], across[n]) if relation in ("left of", "right of") else (across[n], along[n])
        things.append(Thing(shape, colour, sizes[n], x, y, sides[n]))
    return things[0], things[1], relation


def _in_telling_order(first: Thing, second: Thing, relation: str) -> tuple[tuple[Thing, Thing], str]:
    """The small thing first, of two alike the left or upper one, so that the picture decides the caption."""
    kept = first.size == "small" if first.size != second.size else relation in ("left of", "above")
    return ((first, second), relation) if kept else ((second, first), INVERSE[relation])


def _place_many(dice: Dice, look: tuple[str, str], count: int) -> tuple[Thing, ...]:
    """Equal things in different cells of a 3 × 3 grid, shifted within their cells."""
    side = dice.uniform(*COUNTED_SIZE)
    cell = (1 - 2 * MARGIN) / 3
    shift = (cell - side) / 2 - 0.005
    things = []
    for cell_number in dice.sample(range(9), count):
        x = MARGIN + (cell_number % 3 + 0.5) * cell + dice.uniform(-shift, shift)
        y = MARGIN + (cell_number // 3 + 0.5) * cell + dice.uniform(-shift, shift)
        things.append(Thing(*look, "", x, y, side))
    return tuple(things)
