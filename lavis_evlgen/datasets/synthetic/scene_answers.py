"""Questions about a scene, each with its one answer: what the picture decides, and nothing that it leaves open."""

from collections import Counter
from typing import NamedTuple

from lavis_evlgen.datasets.synthetic.scene_language import NUMBERS, plural
from lavis_evlgen.datasets.synthetic.scene_specs import BACKGROUNDS, COLOURS, INVERSE, SHAPES, SIZES, Scene

ASKED = ("colour", "shape", "size", "place", "number", "background")  # kinds of question
COUNTS = {1: "one", **NUMBERS}
ANSWERS = (*COLOURS, *SHAPES, *SIZES, *COUNTS.values(), *BACKGROUNDS)  # all that any question is answered with


class Asked(NamedTuple):
    """A question, its answer and its kind, one of ASKED."""

    question: str
    answer: str
    kind: str


def questions_of(scene: Scene) -> list[Asked]:
    """All questions about a scene, in a fixed order. A thing is called by its shape or colour where no other has it."""
    found = [*_of_one_look(scene)] if scene.kind != "pair" else [*_of_two(scene)]
    return [
        *found,
        Asked("How many things are there?", COUNTS[len(scene.things)], "number"),
        Asked("What colour is the background?", scene.background, "background"),
    ]


def _of_one_look(scene: Scene) -> list[Asked]:
    """One thing, or several that look alike."""
    thing, several = scene.things[0], len(scene.things) > 1
    verb, noun = ("are", plural(thing.shape)) if several else ("is", thing.shape)
    found = [
        Asked(f"What colour {verb} the {noun}?", thing.colour, "colour"),
        Asked(f"What shape {verb} the {thing.colour} {'things' if several else 'thing'}?", thing.shape, "shape"),
    ]
    return found if several else [*found, Asked(f"What size is the {noun}?", thing.size, "size")]


def _of_two(scene: Scene) -> list[Asked]:
    found, shapes, colours = [], *(Counter(getattr(t, look) for t in scene.things) for look in ("shape", "colour"))
    relations = (scene.relation, INVERSE[scene.relation])
    for thing, other, relation in zip(scene.things, reversed(scene.things), relations, strict=True):
        if shapes[thing.shape] == 1:
            found.append(Asked(f"What colour is the {thing.shape}?", thing.colour, "colour"))
            found.append(Asked(f"What size is the {thing.shape}?", thing.size, "size"))
            found.append(Asked(f"What is {relation} the {other.shape}?", thing.shape, "place"))
        if colours[thing.colour] == 1:
            found.append(Asked(f"What shape is the {thing.colour} thing?", thing.shape, "shape"))
    return found
