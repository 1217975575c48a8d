"""The transformer's training views: whole scenes at many sizes and shapes, and windows cut out of larger ones.

A view's caption contains only what is true of it. A window moves the object and changes its share of the picture, so
its words for place and size are determined again from what is visible, and left out if none fits.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

import world

Size = tuple[int, int]
Box = tuple[float, float, float, float]

CRITTER_SHARE = 0.35  # views of critters
WHOLE_SHARE = 0.75  # views that show a whole scene
SHARP_SHARE = 0.5  # windows whose pixels are unscaled; the others are scaled down
CANVASES = (192, 256, 320, 384, 512)
CANVAS_REACH = 2.0  # a scene is drawn at most this many times larger than a view of it
LEAST_SEEN = 0.6  # minimum share of the object that a window must show
PLACE_TOLERANCE, SIZE_TOLERANCE = 0.05, 0.1


@dataclass(frozen=True)
class View:
    """A part of a drawn scene, shown at some size.

    Attributes:
        scene: What is drawn.
        canvas: Width and height at which it is drawn, in pixels.
        box: Left, top, right and bottom of the window, in pixels of the canvas.
        size: Width and height at which the window is shown, in pixels.
    """

    scene: world.Scene
    canvas: Size
    box: Box
    size: Size

    @property
    def whole(self) -> bool:
        """Whether it is the whole scene, unscaled."""
        return self.box == (0, 0, *self.canvas) and self.canvas == self.size

    def circle(self) -> tuple[float, float, float]:
        """The object's middle as shares of the view's width and height, its radius as a share of the shorter side."""
        drawn = world.layout(self.scene)
        left, top, right, bottom = self.box
        x, y = (share * side for share, side in zip(drawn.centre, self.canvas, strict=True))
        radius = drawn.radius * min(self.canvas) / min(right - left, bottom - top)
        return (x - left) / (right - left), (y - top) / (bottom - top), radius

    def seen(self) -> float:
        """Share of the square around the object that is inside the view."""
        x, y, radius = self.circle()
        reach = (radius * min(self.size) / side for side in self.size)
        share = 1.0
        for middle, half in zip((x, y), reach, strict=True):
            share *= max(0.0, min(1.0, middle + half) - max(0.0, middle - half)) / (2 * half)
        return share

    def told(self) -> tuple[world.Scene, bool, bool]:
        """The scene as the view shows it, whether a word fits the object's size, and whether one fits its place."""
        x, y, radius = self.circle()
        size = _nearest(world.SIZES, lambda value: abs(radius / value - 1), SIZE_TOLERANCE)
        shown = world.nearer_to_the_middle if world.is_creature(self.scene) else lambda at: at
        places = {name: shown(middle) for name, middle in world.PLACES.items()}
        place = _nearest(places, lambda at: max(abs(x - at[0]), abs(y - at[1])), PLACE_TOLERANCE)
        scene = dataclasses.replace(self.scene, size=size or self.scene.size, place=place or self.scene.place)
        return scene, size is not None, place is not None

    def captions(self) -> list[str]:
        """Four true captions: with size and place, without the place, without the size, without both.

        A word that does not fit is in none of them.
        """
        scene, sized, placed = self.told()
        return [world.caption(scene, sized and a, placed and b) for a in (True, False) for b in (True, False)]

    def draw(self) -> Image.Image:
        """The picture."""
        picture = world.render(self.scene, self.canvas)
        return picture if self.whole else picture.resize(self.size, Image.Resampling.LANCZOS, box=self.box)


def _nearest(words: dict[str, Any], distance: Callable[[Any], float], tolerance: float) -> str | None:
    """The word with the least distance, if that is within the tolerance."""
    word = min(words, key=lambda name: distance(words[name]))
    return word if distance(words[word]) <= tolerance else None


def random_view(rng: random.Random, size: Size, reserved: frozenset[str] = frozenset()) -> View:
    """A view of a random scene at a size, never one whose full caption is reserved for tests."""
    while True:
        scene = (world.random_critter if rng.random() < CRITTER_SHARE else world.random_scene)(rng)
        view = (
            View(scene, size, (0, 0, *size), size)
            if rng.random() < WHOLE_SHARE
            else _window(rng, scene, size)
        )
        if view.seen() >= LEAST_SEEN and not reserved & set(view.captions()):
            return view


def whole_scene(rng: random.Random, size: Size, reserved: frozenset[str] = frozenset()) -> View:
    """A whole random scene without creatures, never one whose full caption is reserved for tests."""
    while True:
        view = View(world.random_scene(rng), size, (0, 0, *size), size)
        if world.caption(view.scene) not in reserved:
            return view


def _window(rng: random.Random, scene: world.Scene, size: Size) -> View:
    """A window anywhere on a square canvas, with the view's proportions."""
    longest = max(size)
    side = rng.choice([side for side in CANVASES if longest < side <= CANVAS_REACH * longest])
    zoom = 1.0 if rng.random() < SHARP_SHARE else rng.uniform(1.0, side / longest)
    width, height = (zoom * one for one in size)
    left, top = (rng.random() * (side - one) for one in (width, height))
    if zoom == 1.0:  # whole pixels, so that nothing is blurred
        left, top = round(left), round(top)
    return View(scene, (side, side), (left, top, left + width, top + height), size)
