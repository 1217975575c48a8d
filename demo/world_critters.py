"""Random creatures, no two alike: a model that has seen some knows faces, as large models know cats and bears.

Each is put together from parts in random sizes and colours: a head, ears, eyes, a nose, a mouth, clothes. The subjects are
drawn by their own functions with their own sizes and colours and are never among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world_board import INK, PAPER, Board, Colour

ACCENTS: tuple[Colour, ...] = (
    (222, 48, 48), (247, 144, 30), (250, 218, 60), (52, 178, 74), (48, 96, 222), (140, 64, 190), (246, 134, 178),
    (246, 246, 242), (36, 132, 140), (120, 84, 52),
)  # fmt: skip


def jittered(rng: random.Random, colour: Colour, reach: int = 22) -> Colour:
    """A colour near another one."""
    red, green, blue = (max(0, min(255, value + rng.randint(-reach, reach))) for value in colour)
    return red, green, blue


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share of another one."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(colour, other, strict=True))
    return red, green, blue


@dataclass
class Creature:
    """What the parts share.

    Attributes:
        rng: Chooses sizes and colours.
        fur, rim, light: The colours of the body, its outline, and its bright parts.
        wide, high, y: Half the head's width and height and its middle's height, in radii.
        boxy: Whether the head is a box.
    """

    rng: random.Random
    fur: Colour
    rim: Colour
    light: Colour
    wide: float
    high: float
    y: float
    boxy: bool

    def accent(self) -> Colour:
        """A colour for clothes."""
        return jittered(self.rng, self.rng.choice(ACCENTS), 30)

    def blob(
        self, board: Board, x: float, y: float, rx: float, ry: float, fill: Colour, round_: float = 0.6
    ) -> None:
        """An oval, or a box with round corners for a boxy creature, with an outline."""
        for inset, colour in ((0.0, self.rim), (0.07, fill)):
            if self.boxy:
                sides = (x - rx + inset, y - ry + inset, x + rx - inset, y + ry - inset)
                board.box(*sides, round_ * min(rx, ry), colour)
            else:
                board.oval(x, y, rx - inset, ry - inset, colour)


def draw(board: Board, colour: Colour, boxy: bool, seed: int) -> None:
    """Draw the creature of a seed: its fur in a colour, its head round or boxy."""
    rng = random.Random(f"critter/{seed}")
    fur = jittered(rng, colour)
    light = mixed(fur, PAPER, rng.uniform(0.55, 0.95))
    wide, high = rng.uniform(0.68, 0.92), rng.uniform(0.56, 0.8)
    rim = mixed(fur, INK, rng.uniform(0.45, 0.75))
    creature = Creature(rng, fur, rim, light, wide, high, rng.uniform(-0.12, 0.08), boxy)
    for parts in (EARS, BODIES):
        rng.choice(parts)(board, creature)
    creature.blob(board, 0, creature.y, wide, high, fur)
    for parts in (PATCHES, HATS, EYES, MOUTHS, CHEEKS, NECKS):
        rng.choice(parts)(board, creature)


def nothing(board: Board, creature: Creature) -> None:
    """No such part."""


def round_ears(board: Board, it: Creature) -> None:
    """Two round ears."""
    size, inner = it.rng.uniform(0.2, 0.32), it.rng.choice((it.light, it.accent(), it.fur))
    x, y = it.wide * it.rng.uniform(0.65, 0.9), it.y - it.high * it.rng.uniform(0.55, 0.85)
    for side in (-1, 1):
        board.oval(side * x, y, size, fill=it.rim)
        board.oval(side * x, y, size * 0.7, fill=inner)


def pointed_ears(board: Board, it: Creature) -> None:
    """Two pointed ears."""
    inner, top = it.accent(), it.y - it.high - it.rng.uniform(0.15, 0.4)
    for side in (-1, 1):
        board.shape(
            [(side * it.wide, top), (side * 0.15, it.y - 0.5 * it.high), (side * it.wide, it.y)], it.rim
        )
        inside = [
            (side * 0.9 * it.wide, top + 0.16),
            (side * 0.35, it.y - 0.55 * it.high),
            (side * 0.86 * it.wide, it.y),
        ]
        board.shape(inside, inner)


def hanging_ears(board: Board, it: Creature) -> None:
    """Two ears that hang down at the sides."""
    long, fill = it.rng.uniform(0.3, 0.5), it.rng.choice((it.rim, it.accent()))
    for side in (-1, 1):
        board.oval(side * it.wide * 1.02, it.y + 0.05, 0.2, long, it.rim)
        board.oval(side * it.wide * 1.02, it.y + 0.05, 0.13, long - 0.07, fill)


def horns(board: Board, it: Creature) -> None:
    """Two horns, plain or with rings."""
    fill, ringed = it.rng.choice((it.light, it.accent())), it.rng.random() < 0.5
    tip, foot = it.rng.uniform(0.3, 0.55), it.y - 0.75 * it.high
    for side in (-1, 1):
        board.shape([(side * 0.25, foot), (side * 0.66, foot + 0.1), (side * 0.72, foot - tip)], fill)
        if ringed:
            for share in (0.3, 0.6):
                level = foot - tip * share
                board.stroke([(side * (0.36 + 0.2 * share), level + 0.06), (side * 0.7, level)], 0.05, it.rim)


def antenna(board: Board, it: Creature) -> None:
    """One or two antennas with a ball."""
    ball, size, top = it.accent(), it.rng.uniform(0.1, 0.17), it.y - it.high - it.rng.uniform(0.2, 0.36)
    for x in it.rng.choice(((0.0,), (-0.34, 0.34))):
        board.stroke([(x * 0.7, it.y - 0.8 * it.high), (x, top)], 0.07, it.rim)
        board.oval(x, top, size, fill=ball)


def small_body(board: Board, it: Creature) -> None:
    """A body below the head, plain, spotted or with a bright belly."""
    wide, high = it.wide * it.rng.uniform(0.6, 0.85), it.rng.uniform(0.3, 0.44)
    middle = it.y + it.high + 0.35 * high
    it.blob(board, 0, middle, wide, high, it.fur)
    kind, fill = it.rng.randrange(4), it.rng.choice((it.light, it.accent()))
    if kind == 0:
        board.oval(0, middle + 0.06, 0.6 * wide, 0.7 * high, fill)
    elif kind == 1:
        for x, y in ((-0.25, 0.1), (0.0, 0.16), (0.25, 0.1), (-0.12, 0.28), (0.12, 0.28)):
            board.oval(x, middle + y, 0.07, fill=fill)
    elif kind == 2:
        for x in (-0.22, 0.0, 0.22):
            board.oval(x, middle + 0.12, 0.09, fill=it.accent())


def feet(board: Board, it: Creature) -> None:
    """Two feet and two arms."""
    fill, arm = it.rng.choice((it.rim, it.accent())), it.rng.choice((it.rim, it.fur))
    for side in (-1, 1):
        board.oval(side * 0.32, it.y + it.high + 0.1, 0.24, 0.13, fill)
        board.oval(side * it.wide, it.y + 0.25, 0.17, 0.36, arm)


def face_patch(board: Board, it: Creature) -> None:
    """A bright patch around eyes and mouth."""
    board.oval(0, it.y + 0.06, 0.78 * it.wide, 0.74 * it.high, it.light)


def muzzle(board: Board, it: Creature) -> None:
    """A bright patch around nose and mouth."""
    board.oval(0, it.y + 0.28, it.rng.uniform(0.24, 0.46), it.rng.uniform(0.18, 0.3), it.light)


def belly(board: Board, it: Creature) -> None:
    """A bright lower half and two bright eye patches."""
    board.oval(0, it.y + 0.42 * it.high, 0.62 * it.wide, 0.5 * it.high, it.light)
    for side in (-1, 1):
        board.oval(side * 0.26, it.y - 0.25, 0.26, 0.26, it.light)


def spots(board: Board, it: Creature) -> None:
    """Spots on the fur."""
    fill = it.rng.choice((it.rim, it.light, it.accent()))
    for _ in range(it.rng.randint(3, 6)):
        x, y = it.rng.uniform(-0.75, 0.75) * it.wide, it.y + it.rng.uniform(-0.7, 0.75) * it.high
        board.oval(x, y, it.rng.uniform(0.05, 0.11), fill=fill)


def brow_stripes(board: Board, it: Creature) -> None:
    """Three stripes on the forehead."""
    for x in (-0.16, 0.0, 0.16):
        board.stroke([(x, it.y - 0.92 * it.high), (x * 0.8, it.y - 0.6 * it.high)], 0.07, it.rim)


def button_eyes(board: Board, it: Creature) -> None:
    """Two dark eyes with a glint."""
    gap, radius, y = it.rng.uniform(0.22, 0.4), it.rng.uniform(0.08, 0.13), it.y - it.rng.uniform(0.02, 0.2)
    for side in (-1, 1):
        board.oval(side * gap, y, radius, radius * 1.15, INK)
        board.oval(side * gap + radius * 0.3, y - radius * 0.4, radius * 0.32, fill=PAPER)


def round_eyes(board: Board, it: Creature) -> None:
    """Two white eyes with coloured irises."""
    gap, radius, y = it.rng.uniform(0.28, 0.42), it.rng.uniform(0.16, 0.23), it.y - it.rng.uniform(0.05, 0.25)
    iris = it.rng.choice((INK, it.accent()))
    for side in (-1, 1):
        board.oval(side * gap, y, radius, fill=PAPER)
        board.oval(side * gap, y, radius * 0.55, fill=iris)


def slit_eyes(board: Board, it: Creature) -> None:
    """Two bright eyes with upright pupils."""
    fill, gap, y = (
        mixed(it.accent(), PAPER, 0.4),
        it.rng.uniform(0.28, 0.42),
        it.y - it.rng.uniform(0.05, 0.2),
    )
    for side in (-1, 1):
        board.oval(side * gap, y, 0.16, 0.19, fill)
        board.oval(side * gap, y, 0.055, 0.17, INK)


def one_eye(board: Board, it: Creature) -> None:
    """One large eye in the middle."""
    y, radius = it.y - it.rng.uniform(0.1, 0.25), it.rng.uniform(0.24, 0.34)
    for share, fill in ((1.0, PAPER), (0.62, it.accent()), (0.3, INK)):
        board.oval(0, y, radius * share, fill=fill)


def smile(board: Board, it: Creature) -> None:
    """A nose and a smile."""
    y = it.y + it.rng.uniform(0.16, 0.26)
    board.oval(0, y, it.rng.uniform(0.06, 0.11), 0.06, it.rng.choice((INK, it.accent())))
    board.arc(0, y + 0.05, 0.14, 0.12, (20, 160), 0.055)


def cat_mouth(board: Board, it: Creature) -> None:
    """A pointed nose, two curves and whiskers."""
    y = it.y + it.rng.uniform(0.12, 0.22)
    board.shape([(-0.1, y), (0.1, y), (0.0, y + 0.12)], it.accent())
    for side in (-1, 1):
        board.arc(side * 0.12, y + 0.18, 0.12, 0.1, (10, 170), 0.05)
        for tilt in (-0.1, 0.12):
            board.stroke(
                [(side * 0.36, y + 0.14 + tilt * 0.5), (side * (it.wide + 0.12), y + 0.1 + tilt * 1.6)], 0.05
            )


def beak(board: Board, it: Creature) -> None:
    """A beak."""
    y, wide = it.y + it.rng.uniform(-0.05, 0.1), it.rng.uniform(0.14, 0.22)
    board.shape([(-wide, y), (wide, y), (0.0, y + it.rng.uniform(0.2, 0.3))], it.accent())


def grille(board: Board, it: Creature) -> None:
    """A dark mouth with bright bars."""
    y, wide, fill = (
        it.y + it.rng.uniform(0.2, 0.3),
        it.rng.uniform(0.3, 0.46),
        it.rng.choice((PAPER, it.light)),
    )
    board.box(-wide, y, wide, y + 0.2, 0.05, INK)
    for i in range(4):
        board.box(
            -wide + wide * (0.5 * i + 0.13), y + 0.04, -wide + wide * (0.5 * i + 0.4), y + 0.16, fill=fill
        )


def grin(board: Board, it: Creature) -> None:
    """A wide mouth with teeth."""
    y, wide = it.y + it.rng.uniform(0.2, 0.32), it.rng.uniform(0.3, 0.5)
    board.box(-wide, y, wide, y + 0.24, 0.12, (92, 28, 40))
    for i in range(4):
        x = -wide + wide * (0.5 * i + 0.08)
        board.shape([(x, y), (x + 0.34 * wide, y), (x + 0.17 * wide, y + 0.13)], PAPER)


def cheeks(board: Board, it: Creature) -> None:
    """Two blushed cheeks."""
    for side in (-1, 1):
        board.oval(side * 0.62 * it.wide, it.y + 0.22, 0.13, 0.1, jittered(it.rng, (244, 120, 130)))


def cone_hat(board: Board, it: Creature) -> None:
    """A pointed hat with stripes and a bobble."""
    foot, top = it.y - 0.66 * it.high, it.y - it.high - it.rng.uniform(0.25, 0.5)
    wide, first, second = it.rng.uniform(0.32, 0.46), it.accent(), it.accent()
    cone = [(-wide, foot), (wide, foot), (0.0, top)]

    def stripes(sheet: Board) -> None:
        sheet.box(-1.5, -1.5, 1.5, 1, fill=first)
        for i in range(6):
            sheet.box(-1.5, foot - 0.1 - 0.22 * i, 1.5, foot - 0.22 * i, fill=second)

    board.clipped(lambda sheet: sheet.shape(cone, INK), stripes)
    board.oval(0, top, it.rng.uniform(0.09, 0.15), fill=it.accent())


def cap(board: Board, it: Creature) -> None:
    """A cap with a peak."""
    fill, y = it.accent(), it.y - 0.62 * it.high
    board.clipped(lambda sheet: sheet.oval(0, y, 0.62 * it.wide, 0.5 * it.high, INK),
                  lambda sheet: sheet.box(-1, y - 1, 1, y, fill=fill))  # fmt: skip
    board.box(-0.72 * it.wide, y - 0.05, 0.72 * it.wide, y + 0.06, 0.05, mixed(fill, INK, 0.4))


def crown(board: Board, it: Creature) -> None:
    """A crown."""
    y, wide = it.y - 0.8 * it.high, it.rng.uniform(0.3, 0.42)
    points = [(-wide, y), (-wide, y - 0.35), (-0.5 * wide, y - 0.15), (0.0, y - 0.4), (0.5 * wide, y - 0.15)]
    board.shape([*points, (wide, y - 0.35), (wide, y)], jittered(it.rng, (250, 206, 50)))


def bow(board: Board, it: Creature) -> None:
    """A bow below the head, with or without dots."""
    fill, dot, y = it.accent(), it.accent(), it.y + it.high + 0.04
    size = it.rng.uniform(0.34, 0.48)
    for side in (-1, 1):
        board.shape([(0, y), (side * size, y - 0.2), (side * size, y + 0.2)], fill)
        board.oval(side * 0.62 * size, y, 0.06, fill=dot)
    board.oval(0, y, 0.1, fill=mixed(fill, INK, 0.25))


def scarf(board: Board, it: Creature) -> None:
    """A striped scarf."""
    first, second, y = it.accent(), it.accent(), it.y + it.high * it.rng.uniform(0.72, 0.95)

    def knit(sheet: Board) -> None:
        sheet.box(-1.2, -1.5, 1.2, 1.5, fill=first)
        for i in range(-4, 5):
            sheet.box(0.28 * i - 0.07, -1.5, 0.28 * i + 0.07, 1.5, fill=second)

    board.clipped(lambda sheet: sheet.box(-0.9 * it.wide, y - 0.12, 0.9 * it.wide, y + 0.13, 0.1), knit)


Part = Callable[[Board, Creature], None]
EARS: tuple[Part, ...] = (nothing, round_ears, round_ears, pointed_ears, hanging_ears, horns, antenna)
BODIES: tuple[Part, ...] = (small_body, small_body, feet, nothing)
PATCHES: tuple[Part, ...] = (nothing, face_patch, muzzle, muzzle, belly, spots, brow_stripes)
HATS: tuple[Part, ...] = (nothing, nothing, nothing, nothing, cone_hat, cap, crown)
EYES: tuple[Part, ...] = (button_eyes, button_eyes, round_eyes, slit_eyes, one_eye)
MOUTHS: tuple[Part, ...] = (smile, smile, cat_mouth, beak, grille, grin)
CHEEKS: tuple[Part, ...] = (nothing, cheeks)
NECKS: tuple[Part, ...] = (nothing, nothing, bow, scarf)
