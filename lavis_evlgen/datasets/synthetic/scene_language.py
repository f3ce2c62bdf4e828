"""Five captions of a scene: the canonical one, decided by the picture, and four paraphrases."""

from lavis_evlgen.datasets.synthetic.scene_specs import INVERSE, Scene, Thing

NUMBERS = {2: "two", 3: "three", 4: "four"}
_SYNONYMS = {"small": "little", "large": "big", "left of": "to the left of", "right of": "to the right of",
             "above": "over", "below": "under"}
CAPTIONS_PER_SCENE = 5


def captions_of(scene: Scene) -> tuple[str, ...]:
    """The five captions of a scene, the canonical one first."""
    tell = {"single": _single, "pair": _pair, "count": _count}[scene.kind]
    return tuple(tell(scene))


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _look(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _single(scene: Scene) -> list[str]:
    (thing,) = scene.things
    told, ground = f"{thing.size} {_look(thing)}", scene.background
    return [
        f"a {told} on {ground}",
        f"a {told} on a {ground} background",
        f"a {_SYNONYMS[thing.size]} {_look(thing)} on a {ground} background",
        f"a {ground} background with a {told}",
        f"{_with_article(_look(thing))} that is {thing.size} on a {ground} background",
    ]


def _pair(scene: Scene) -> list[str]:
    first, second = (f"{thing.size} {_look(thing)}" for thing in scene.things)
    little, big = (f"{_SYNONYMS[thing.size]} {_look(thing)}" for thing in scene.things)
    one, other = map(_look, scene.things)
    relation = scene.relation
    return [
        f"a {first} {relation} a {second}",
        f"a {second} {INVERSE[relation]} a {first}",
        f"a {little} {_SYNONYMS[relation]} a {big}",
        f"{_with_article(other)} {INVERSE[relation]} {_with_article(one)}",
        f"a {first} that is {relation} a {second}",
    ]


def _count(scene: Scene) -> list[str]:
    thing, number, ground = scene.things[0], NUMBERS[len(scene.things)], scene.background
    shapes = plural(thing.shape)
    return [
        f"{number} {thing.colour} {shapes} on {ground}",
        f"{number} {thing.colour} {shapes} on a {ground} background",
        f"a {ground} background with {number} {thing.colour} {shapes}",
        f"{number} {shapes} in {thing.colour} on a {ground} background",
        f"a group of {number} {thing.colour} {shapes} on a {ground} background",
    ]
