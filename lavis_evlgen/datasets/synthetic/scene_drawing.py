"""Draw a scene with Pillow: flat shapes on a plain ground, drawn at twice the size and halved."""

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from lavis_evlgen.datasets.synthetic.scene_specs import Dice, Scene, Thing

COLOURS = {  # RGB; far enough apart that the jitter never makes one look like another
    "red": (215, 25, 30), "orange": (250, 130, 15), "yellow": (245, 220, 25), "green": (30, 150, 55),
    "blue": (30, 60, 205), "purple": (125, 35, 165), "pink": (250, 125, 190), "brown": (125, 75, 35),
}
BACKGROUNDS = {
    "white": (245, 245, 245), "grey": (150, 150, 150), "black": (15, 15, 15), "sky-blue": (150, 210, 240),
    "beige": (225, 210, 175),
}
JITTER = 10  # of each colour channel, of 255
NOISE = 4  # of each pixel, of 255
_OVERSAMPLING = 2


def draw_scene(scene: Scene, side: int) -> Image.Image:
    """The RGB picture of a scene, `side` × `side` pixels. Depends on nothing but its arguments."""
    dice = Dice("colours", scene.noise)
    picture = Image.new("RGB", (side * _OVERSAMPLING,) * 2, _shade(dice, BACKGROUNDS[scene.background]))
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(draw, thing, side * _OVERSAMPLING, _jitter(dice, COLOURS[thing.colour]))
    pixels = np.asarray(picture.reduce(_OVERSAMPLING), dtype=np.int16)  # (side, side, 3)
    # RandomState, not default_rng: numpy keeps its stream from version to version
    noise = np.random.RandomState(scene.noise).bytes(side * side)
    noise = np.frombuffer(noise, np.uint8).astype(np.int16) % (2 * NOISE + 1) - NOISE
    pixels = pixels + noise.reshape(side, side, 1)  # the same on all three channels: brightness only
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jitter(dice: Dice, colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(min(255, max(0, round(channel + dice.uniform(-JITTER, JITTER)))) for channel in colour)


def _shade(dice: Dice, colour: tuple[int, int, int]) -> tuple[int, ...]:
    """Brighter or darker, but of the same tint: white must not turn pink."""
    step = dice.uniform(-JITTER, JITTER)
    return tuple(min(255, max(0, round(channel + step))) for channel in colour)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int, colour: tuple[int, ...]):
    x, y, radius = thing.x * side, thing.y * side, thing.side * side / 2
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        draw.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=colour, width=round(radius * 0.38))
    else:
        points = OUTLINES[thing.shape]
        draw.polygon([(round(x + u * radius, 2), round(y + v * radius, 2)) for u, v in points], fill=colour)


def _star() -> list[tuple[float, float]]:
    corners = []
    for n in range(10):
        reach, angle = (1.0 if n % 2 == 0 else 0.42), pi * n / 5
        corners.append((reach * sin(angle), -reach * cos(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    points = []
    for n in range(60):
        t = 2 * pi * n / 60
        u = 16 * sin(t) ** 3
        v = 13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)
        points.append((u / 17, -(v + 2.5) / 15))
    return points


# Outlines in the box -1..1, y downwards.
OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
              (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "star": _star(),
    "heart": _heart(),
}
