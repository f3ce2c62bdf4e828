"""What a drawn clip shows, sampled from (seed, split, index): an event with a twin, the same frames in reverse order.

A pair of clips is sampled together, the event forwards and backwards: moves left and right, up and down, appears and
leaves, turns from one colour to another and back, collide and part. Both have the same set of frames, so nothing but
their order tells the two captions apart. What the two captions tell is the pair's combination; every combination
always belongs to the same split, as in scene_specs.
"""

from functools import cache
from itertools import combinations
from typing import NamedTuple

from lavis_evlgen.datasets.synthetic.scene_specs import (
    BACKGROUNDS,
    COLOURS,
    MARGIN,
    SHAPES,
    Dice,
    Scene,
    Thing,
    free_centre,
    number_of,
    share_of,
)

KINDS = ("move", "appear", "turn", "meet")
# each event and what it is backwards; "turns" is its own twin, with the colours exchanged
TWINS = {"moves left": "moves right", "moves up": "moves down", "appears": "leaves", "collide": "part"}
SIZE = (0.20, 0.30)  # of the picture's side
_SLACK = 0.12  # a path may begin and end this far from where it could
_CHANGE = (0.25, 0.75)  # when something appears or changes colour, of the clip's duration


class Motion(NamedTuple):
    """One clip. `start` and `end` are its things at the two ends of the event told forwards; `when` a sudden change
    takes place (0 to 1); `backwards`: the frames come in reverse order; `noise` as in Scene."""

    kind: str
    event: str
    start: tuple[Thing, ...]
    end: tuple[Thing, ...]
    when: float
    background: str
    noise: int
    backwards: bool

    def scene(self, number: int, total: int) -> Scene:
        """What frame `number` of `total` (2 or more) shows."""
        number = total - 1 - number if self.backwards else number
        done = number / (total - 1)
        if self.kind in ("appear", "turn"):
            things = self.start if done < self.when else self.end
        else:
            things = tuple(map(_between, self.start, self.end, (done,) * len(self.start)))
        return Scene(self.kind, things, self.background, "", self.noise)

    @property
    def caption(self) -> str:
        """What happens, in no word more than that takes."""
        before, after = (self.end, self.start) if self.backwards else (self.start, self.end)
        if self.kind == "turn":
            return f"{_look(before[0])} turns {after[0].colour}"
        event = TWINS[self.event] if self.backwards else self.event
        return f"{' and '.join(map(_look, self.start or self.end))} {event}"


def _look(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _between(start: Thing, end: Thing, done: float) -> Thing:
    return start._replace(x=start.x + (end.x - start.x) * done, y=start.y + (end.y - start.y) * done)


@cache
def motions_of(kind: str, split: str) -> tuple[tuple, ...]:
    """All combinations of a kind that belong to a split, in a fixed order; no two splits share one."""
    looks = sorted((shape, colour) for shape in SHAPES for colour in COLOURS)
    if kind == "move":
        found = [("move", look, event) for look in looks for event in ("moves left", "moves up")]
    elif kind == "appear":
        found = [("appear", look, "appears") for look in looks]
    elif kind == "turn":
        found = [("turn", shape, *pair) for shape in SHAPES for pair in combinations(COLOURS, 2)]
    else:
        found = [("meet", *pair) for pair in combinations(looks, 2)]
    return share_of(found, split)


def sample_motion(seed: int, split: str, index: int, kinds: dict[str, float]) -> Motion:
    """Clip number `index` of a split: 2n and 2n + 1 are twins. `kinds`: {kind: weight}."""
    pair, backwards = divmod(index, 2)
    dice = Dice("motion", seed, split, pair)
    kind = dice.weighted(kinds)
    _, *told = dice.pick(motions_of(kind, split))
    event, start, end = {"move": _move, "appear": _appear, "turn": _turn, "meet": _meet}[kind](dice, *told)
    noise = number_of("motion noise", seed, split, pair) % 2**32
    return Motion(kind, event, start, end, dice.uniform(*_CHANGE), dice.pick(BACKGROUNDS), noise, bool(backwards))


def _move(dice: Dice, look: tuple, event: str):
    side = dice.uniform(*SIZE)
    near = MARGIN + side / 2 + dice.uniform(0, _SLACK)
    far = 1 - MARGIN - side / 2 - dice.uniform(0, _SLACK)
    across = free_centre(dice, side)
    places = [(far, across), (near, across)] if event == "moves left" else [(across, far), (across, near)]
    start, end = (Thing(*look, "", *place, side) for place in places)
    return event, (start,), (end,)


def _appear(dice: Dice, look: tuple, event: str):
    side = dice.uniform(*SIZE)
    return event, (), (Thing(*look, "", free_centre(dice, side), free_centre(dice, side), side),)


def _turn(dice: Dice, shape: str, one: str, other: str):
    side = dice.uniform(*SIZE)
    thing = Thing(shape, one, "", free_centre(dice, side), free_centre(dice, side), side)
    return "turns", (thing,), (thing._replace(colour=other),)


def _meet(dice: Dice, look: tuple, other: tuple):
    """Two things at opposite sides, that touch near the middle; the left or upper one is told first."""
    first, second = dice.sample((look, other), 2)
    sides = [dice.uniform(*SIZE) for _ in range(2)]
    touching = 0.5 + dice.uniform(-0.05, 0.05)
    across, level = free_centre(dice, max(sides)), dice.pick((True, False))
    things = []
    for looks, side, apart, met in (
        (first, sides[0], MARGIN + sides[0] / 2, touching - sides[0] / 2),
        (second, sides[1], 1 - MARGIN - sides[1] / 2, touching + sides[1] / 2),
    ):
        for along in (apart, met):
            things.append(Thing(*looks, "", *((along, across) if level else (across, along)), side))
    return "collide", (things[0], things[2]), (things[1], things[3])
