"""A small world of pictures drawn by code: toy shapes on grounds, and subjects that pre-training never sees.

Everything is a function of a scene's fields (including its ``seed``), at any picture size. Places are in
fractions of the picture, drawings in units of the object's radius.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

import world_critters
from world_board import INK, PAPER, Board, Colour, Point

SUPERSAMPLING = 4
OBJECT_BOX = 1.5  # half the side of an object's drawing board, in radii
GROUND_UNITS = 1.5  # side of a ground's texture, in pictures

COLOURS: dict[str, Colour] = {
    "red": (222, 48, 48),
    "orange": (247, 144, 30),
    "yellow": (250, 218, 60),
    "green": (52, 178, 74),
    "blue": (48, 96, 222),
    "purple": (140, 64, 190),
    "pink": (246, 134, 178),
    "white": (246, 246, 242),
}
SIZES: dict[str, float] = {"small": 0.13, "medium": 0.19, "big": 0.26}
PLACES: dict[str, Point] = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "centre": (0.5, 0.5),
}
FINISHES = ("plain", "striped", "dotted", "smiling")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
GROUNDS = ("grass", "sand", "water", "bricks", "sky", "wood")
HELD_OUT_GROUNDS = ("water", "bricks")
SUBJECTS: dict[
    str, str
] = {  # name -> its words in a caption: one that is meaningless so far, and a known kind
    "toby": "a big orange toby circle",
    "mila": "a big purple mila circle",
    "pip": "a big green pip square",
    "zuzu": "a big blue zuzu circle",
    "nori": "a big green nori square",
}
SUBJECT_RADIUS = 0.27
SUBJECT_REACH = 0.72  # subjects and critters are nearer to the middle, so that they stay inside the picture
CRITTER = "critter"  # stands where a finish does: ``a big red critter circle``
CRITTER_SHAPES = ("circle", "square")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (
    PAD, ",", "a", "on", *SIZES, *COLOURS, *FINISHES[1:], *SHAPES, *GROUNDS, *PLACES, *SUBJECTS, CRITTER,
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One toy shape on a ground; ``seed`` moves the texture and jitters the shape."""

    shape: str
    colour: str
    size: str
    finish: str
    ground: str
    place: str
    seed: int = 0


@dataclass(frozen=True)
class SubjectScene:
    """One subject on a ground; ``seed`` moves the texture and jitters the subject."""

    subject: str
    ground: str
    place: str
    seed: int = 0


def caption(scene: Scene | SubjectScene, sized: bool = True, placed: bool = True) -> str:
    """``a big red striped star on grass, left``; the plain finish is not said, nor need size and place be.

    A subject is called by its own word and its kind, as in DreamBooth: ``a big orange toby circle on grass, left``.
    """
    if isinstance(scene, SubjectScene):
        said, finish = SUBJECTS[scene.subject].removeprefix("a ").split(" ", 1), "plain"
    else:
        said, finish = [scene.size, f"{scene.colour} {scene.shape}"], scene.finish
    colour, *kind = said[1].split()
    words = [said[0]] * sized + [colour] + [finish] * (finish != "plain") + kind
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)} on {scene.ground}" + f", {scene.place}" * placed


def random_scene(rng: random.Random) -> Scene:
    """A scene with every field drawn uniformly."""
    return Scene(
        shape=rng.choice(SHAPES),
        colour=rng.choice(list(COLOURS)),
        size=rng.choice(list(SIZES)),
        finish=rng.choice(FINISHES),
        ground=rng.choice(GROUNDS),
        place=rng.choice(list(PLACES)),
        seed=rng.randrange(2**31),
    )


def random_critter(rng: random.Random) -> Scene:
    """A scene with a creature whose looks its seed decides, never a small one: its face would be a few pixels."""
    return Scene(
        shape=rng.choice(CRITTER_SHAPES),
        colour=rng.choice(list(COLOURS)),
        size=rng.choice(("medium", "big", "big")),
        finish=CRITTER,
        ground=rng.choice(GROUNDS),
        place=rng.choice(list(PLACES)),
        seed=rng.randrange(2**31),
    )


def subject_scenes(subject: str, count: int, seed: int, held_out: bool = False) -> list[SubjectScene]:
    """``count`` scenes of a subject, cycling over grounds and places; held-out ones use other grounds."""
    if subject not in SUBJECTS:
        raise ValueError(f"unknown subject {subject!r}: choose one of {', '.join(SUBJECTS)}")
    rng = random.Random(f"{subject}/{seed}/{held_out}")
    grounds = [ground for ground in GROUNDS if (ground in HELD_OUT_GROUNDS) == held_out]
    places = list(PLACES)
    rng.shuffle(grounds)
    rng.shuffle(places)
    return [
        SubjectScene(subject, grounds[i % len(grounds)], places[i % len(places)], rng.randrange(2**31))
        for i in range(count)
    ]


def write_subject_folder(
    folder: Path | str, subject: str, count: int = 6, size: int = 512, seed: int = 0
) -> list[SubjectScene]:
    """Write ``01.png`` + ``01.txt`` and so on, the layout of ComfyUI's "Load Image-Text (from Folder)"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = subject_scenes(subject, count, seed)
    for number, scene in enumerate(scenes, start=1):
        render(scene, size).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")
    return scenes


def read_subject_folder(folder: Path | str) -> dict[str, str]:
    """Read and check the pictures and captions of a folder in that layout, so that no training run starts in vain.

    Raises:
        ValueError: If there is no picture, one has no caption, or a caption has a word that the world does not know.
    """
    folder = Path(folder)
    pictures = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise ValueError(f"There is no picture in {folder}: put in at least one PNG, JPG or WEBP file.")
    captions = {}
    for picture in pictures:
        text = picture.with_suffix(".txt")
        said = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        if not said:
            raise ValueError(
                f"{picture.name} in {folder} has no caption: write what it shows into {text.name}."
            )
        unknown = [word for word in said.lower().replace(",", " , ").split() if word not in VOCABULARY[1:]]
        if unknown:
            raise ValueError(
                f"{text.name} says {unknown[0]!r}, a word that the demo world does not know. "
                f"It knows {', '.join(word for word in VOCABULARY[1:] if word != ',')}."
            )
        captions[picture.name] = said
    return captions


@dataclass(frozen=True)
class Layout:
    """The positions that a scene's seed determines.

    Attributes:
        cut: Where the picture is cut from its ground's texture, as shares of the available space.
        centre: The object's middle, as shares of the picture's width and height.
        radius: The object's radius, as a share of the picture's shorter side.
    """

    cut: Point
    centre: Point
    radius: float


def layout(scene: Scene | SubjectScene) -> Layout:
    """The layout with which a scene is drawn, at any size."""
    rng = random.Random(scene.seed)
    cut = (rng.random(), rng.random())
    x, y = PLACES[scene.place]
    centre = (x + rng.uniform(-0.025, 0.025), y + rng.uniform(-0.025, 0.025))
    zoom = rng.uniform(0.94, 1.06)
    if is_creature(scene):
        centre = nearer_to_the_middle(centre)
    radius = SUBJECT_RADIUS if isinstance(scene, SubjectScene) else SIZES[scene.size]
    return Layout(cut, centre, radius * zoom)


def is_creature(scene: Scene | SubjectScene) -> bool:
    """Whether it shows a subject or a critter, which reach beyond their radius."""
    return isinstance(scene, SubjectScene) or scene.finish == CRITTER


def nearer_to_the_middle(point: Point) -> Point:
    """Where a creature stands whose place has this middle."""
    x, y = (0.5 + SUBJECT_REACH * (value - 0.5) for value in point)
    return x, y


def render(scene: Scene | SubjectScene, size: int | tuple[int, int] = 256) -> Image.Image:
    """Draw a scene as an RGB picture of ``size`` x ``size`` pixels, or of a width and a height.

    Raises:
        ValueError: If one side is longer than ``GROUND_UNITS`` times the other, the width of the grounds.
    """
    width, height = (size, size) if isinstance(size, int) else size
    if max(width, height) > GROUND_UNITS * min(width, height):
        raise ValueError(
            f"a picture of {width} x {height} is too long: one side may be {GROUND_UNITS} times the other"
        )
    drawn = layout(scene)
    picture = _ground(scene.ground, (width, height), drawn.cut)
    if isinstance(scene, SubjectScene):
        _stamp(picture, drawn.centre, drawn.radius, _SUBJECT_DRAWINGS[scene.subject])
    else:
        _stamp(picture, drawn.centre, drawn.radius, lambda board: _toy(board, scene))
    return picture


def doodle(rng: random.Random, size: int = 256) -> Image.Image:
    """A random clutter of strokes, spots and stripes: detail for an autoencoder to learn, without a subject."""
    picture = _ground(rng.choice(GROUNDS), (size, size), (rng.random(), rng.random()))
    for _ in range(rng.randint(2, 6)):
        centre = (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9))
        _stamp(picture, centre, rng.uniform(0.08, 0.3), lambda board: _scribble(board, rng))
    return picture


def _stamp(picture: Image.Image, centre: Point, radius: float, drawing: Callable[[Board], None]) -> None:
    """Draw an object on its own supersampled board and paste it with antialiased edges."""
    size = min(picture.size)
    x, y = centre[0] * picture.width, centre[1] * picture.height
    half = math.ceil(radius * size * OBJECT_BOX) + 1
    left, top = round(x) - half, round(y) - half
    offset = ((x - left) * SUPERSAMPLING, (y - top) * SUPERSAMPLING)
    board = Board(radius * size * SUPERSAMPLING, offset, 2 * half * SUPERSAMPLING)
    drawing(board)
    sticker = board.sheet.reduce(SUPERSAMPLING)
    picture.paste(sticker, (left, top), sticker)


def _shade(colour: Colour, factor: float) -> Colour:
    """Darker below 1, lighter (towards white) above 1."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)


def _toy(board: Board, scene: Scene) -> None:
    """A toy shape: dark rim, coloured body, then its finish; or a critter."""
    colour = COLOURS[scene.colour]
    if scene.finish == CRITTER:
        world_critters.draw(board, colour, scene.shape == "square", scene.seed)
        return
    _body(board, scene.shape, 1.0, _shade(colour, 0.55))
    _body(board, scene.shape, 0.9, colour)
    contrast = (70, 70, 84) if scene.colour in ("white", "yellow") else PAPER

    def paint(sheet: Board) -> None:
        _FINISH_PAINTS[scene.finish](sheet, contrast)

    if scene.finish in ("striped", "dotted"):
        board.clipped(lambda sheet: _body(sheet, scene.shape, 0.9, INK), paint)
    elif scene.finish == "smiling":
        _smile(board, *_FACES.get(scene.shape, (0.0, 0.0, 0.9)))


_FACES: dict[str, tuple[float, float, float]] = {
    "triangle": (0.0, 0.25, 0.7),
    "star": (0.0, 0.05, 0.75),
    "heart": (0.0, -0.15, 0.9),
    "ring": (0.0, 0.0, 0.62),
}


def _smile(board: Board, x: float, y: float, scale: float) -> None:
    """Two eyes and a mouth on a light face patch."""
    board.oval(x, y, 0.62 * scale, 0.56 * scale, PAPER)
    for side in (-1, 1):
        board.oval(x + 0.24 * side * scale, y - 0.14 * scale, 0.11 * scale, 0.15 * scale, INK)
    board.arc(x, y + 0.04 * scale, 0.3 * scale, 0.28 * scale, (20, 160), 0.1 * scale, INK)


def _stripes(board: Board, colour: Colour) -> None:
    """Level stripes across the whole board."""
    for i in range(-3, 4):
        board.box(-1.5, 0.4 * i - 0.1, 1.5, 0.4 * i + 0.1, fill=colour)


def _dots(board: Board, colour: Colour) -> None:
    """Staggered dots across the whole board."""
    for row in range(-3, 4):
        for column in range(-3, 4):
            board.oval(0.5 * column + 0.25 * (row % 2), 0.42 * row, 0.13, fill=colour)


_FINISH_PAINTS: dict[str, Callable[[Board, Colour], None]] = {"striped": _stripes, "dotted": _dots}


def _body(board: Board, shape: str, scale: float, fill: Colour) -> None:
    """A shape's filled silhouette, shrunk about its middle."""
    if shape == "circle":
        board.oval(0, 0, scale, fill=fill)
    elif shape == "square":
        board.box(-0.86 * scale, -0.86 * scale, 0.86 * scale, 0.86 * scale, 0.1, fill)
    elif shape == "ring":
        _ring(board, scale, fill)
    else:
        board.shape([(x * scale, y * scale) for x, y in _OUTLINES[shape]], fill)


def _ring(board: Board, scale: float, fill: Colour) -> None:
    """A ring whose rim is dark on both edges; the hole stays transparent."""
    inset = 1.0 - scale
    width = 0.46 - 2 * inset
    board.arc(0, 0, scale, scale, (0, 360), width, fill)


def _star(points: int = 5, inner: float = 0.5) -> list[Point]:
    """Corners of a star pointing up."""
    radii = [1.08 if i % 2 == 0 else inner * 1.08 for i in range(2 * points)]
    angles = [-math.pi / 2 + math.pi * i / points for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a) + 0.06) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    """A heart curve in the unit box."""
    angles = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.05,
        )
        for a in angles
    ]


_OUTLINES: dict[str, list[Point]] = {
    "triangle": [(0.0, -1.0), (1.02, 0.85), (-1.02, 0.85)],
    "star": _star(),
    "heart": _heart(),
}


def _scribble(board: Board, rng: random.Random) -> None:
    """Random ovals, boxes, polygons, stripes, dots and strokes in random colours."""

    def colour() -> Colour:
        if rng.random() < 0.6:
            return tuple(rng.randrange(256) for _ in range(3))
        return _shade(rng.choice([*COLOURS.values(), INK, PAPER]), rng.uniform(0.5, 1.5))

    body = rng.choice(SHAPES)
    _body(board, body, 1.0, colour())
    _body(board, body, 0.88, colour())
    for _ in range(rng.randint(2, 9)):
        x, y = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8)
        r, s = rng.uniform(0.06, 0.4), rng.uniform(0.06, 0.4)
        kind = rng.randrange(6)
        if kind == 0:
            board.oval(x, y, r, s, colour())
        elif kind == 1:
            board.box(x - r, y - s, x + r, y + s, rng.uniform(0, min(r, s)), colour())
        elif kind == 2:
            board.shape(
                [(x + rng.uniform(-r, r) * 2, y + rng.uniform(-r, r) * 2) for _ in range(4)], colour()
            )
        elif kind == 3:
            points = [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(rng.randint(2, 4))]
            board.stroke(points, rng.uniform(0.03, 0.12), colour())
        elif kind == 4:
            board.arc(x, y, r + 0.1, s + 0.1, (rng.uniform(0, 180), rng.uniform(180, 360)), 0.07, colour())
        else:
            pitch = rng.uniform(0.1, 0.3)
            fill = colour()
            for i in range(5):
                board.box(x - r, y + pitch * i, x + r, y + pitch * (i + 0.5), fill=fill)


def _ground(name: str, size: tuple[int, int], cut: Point) -> Image.Image:
    """A picture-sized crop of a ground's texture; the sky keeps its horizon."""
    texture = _texture(name, min(size))
    width, height = size
    left, top = round(cut[0] * (texture.width - width)), round(cut[1] * (texture.height - height))
    top = 0 if name == "sky" else top
    return texture.crop((left, top, left + width, top + height))


@lru_cache(maxsize=64)
def _texture(name: str, size: int) -> Image.Image:
    """A ground's whole texture at one picture size, drawn once at twice the resolution."""
    unit = 2 * size
    side = round(GROUND_UNITS * unit)
    sheet = Image.new("RGB", (side, side))
    _GROUND_PAINTS[name](sheet, unit, random.Random(name))
    return sheet.reduce(2)


def _wave(length: float, unit: int, level: float, height: float, period: float, phase: float) -> list[Point]:
    """A sine line from the left to the right edge, in texture pixels."""
    steps = 96
    xs = [length * i / steps for i in range(steps + 1)]
    return [(x, level + height * unit * math.sin(2 * math.pi * x / (period * unit) + phase)) for x in xs]


def _paint_grass(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([0, 0, *sheet.size], fill=(106, 170, 70))
    for row in range(round(GROUND_UNITS / 0.11) + 2):
        for column in range(round(GROUND_UNITS / 0.1) + 2):
            x = (column + 0.5 * (row % 2) + rng.uniform(-0.15, 0.15)) * 0.1 * unit
            y = (row + rng.uniform(-0.1, 0.1)) * 0.11 * unit
            lean, half = rng.uniform(-0.02, 0.02) * unit, 0.022 * unit
            shade = (58, 122, 38) if (row + column) % 2 else (156, 212, 100)
            pen.polygon([(x - half, y), (x + half, y), (x + lean, y - 0.09 * unit)], fill=shade)


def _paint_sand(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([0, 0, *sheet.size], fill=(230, 206, 152))
    for i in range(round(GROUND_UNITS / 0.14) + 2):
        line = _wave(sheet.width, unit, 0.14 * unit * i, 0.022, 0.6, 1.3 * i)
        pen.line(line, fill=(208, 178, 120), width=round(0.022 * unit), joint="curve")
    for _ in range(140):
        x, y, r = rng.random() * sheet.width, rng.random() * sheet.height, 0.008 * unit
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(184, 150, 98))


def _paint_water(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([0, 0, *sheet.size], fill=(58, 148, 196))
    for i in range(round(GROUND_UNITS / 0.1) + 2):
        line = _wave(sheet.width, unit, 0.1 * unit * i, 0.02, 0.2, math.pi * (i % 2))
        shade = (142, 208, 232) if i % 2 else (36, 116, 172)
        pen.line(line, fill=shade, width=round(0.02 * unit), joint="curve")


def _paint_bricks(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rectangle([0, 0, *sheet.size], fill=(214, 200, 186))
    width, height, joint = 0.24 * unit, 0.11 * unit, 0.014 * unit
    for row in range(math.ceil(sheet.height / height) + 1):
        for column in range(-1, math.ceil(sheet.width / width) + 1):
            x, y = (column + 0.5 * (row % 2)) * width, row * height
            shade = rng.choice([(170, 88, 66), (184, 100, 76), (156, 78, 60)])
            pen.rectangle([x + joint, y + joint, x + width - joint, y + height - joint], fill=shade)


def _paint_sky(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    for y in range(sheet.height):
        t = min(1.0, y / unit)
        pen.line(
            [(0, y), (sheet.width, y)], fill=(round(110 + 84 * t), round(174 + 52 * t), round(240 + 8 * t))
        )
    for i in range(9):
        x, y = (0.1 + 0.17 * i + rng.uniform(-0.04, 0.04)) * unit, (0.12 + 0.3 * (i % 3)) * unit
        for dx, dy, r in ((-0.06, 0.01, 0.035), (0.0, -0.01, 0.05), (0.06, 0.01, 0.035)):
            left, top = x + (dx - r) * unit, y + (dy - r) * unit
            pen.ellipse([left, top, left + 2 * r * unit, top + 2 * r * unit], fill=(246, 250, 254))
    sheet.paste(sheet.filter(ImageFilter.GaussianBlur(0.006 * unit)))


def _paint_wood(sheet: Image.Image, unit: int, rng: random.Random) -> None:
    pen = ImageDraw.Draw(sheet)
    plank = 0.2 * unit
    for i in range(math.ceil(sheet.width / plank)):
        x = i * plank
        pen.rectangle([x, 0, x + plank, sheet.height], fill=rng.choice([(176, 122, 74), (160, 108, 62)]))
        for j in (0.3, 0.65):
            bend = _wave(sheet.height, unit, x + j * plank, 0.012, 0.7, rng.uniform(0, 6))
            pen.line([(b, a) for a, b in bend], fill=(138, 90, 50), width=round(0.012 * unit), joint="curve")
        pen.line([(x, 0), (x, sheet.height)], fill=(96, 60, 34), width=round(0.016 * unit))


_GROUND_PAINTS: dict[str, Callable[[Image.Image, int, random.Random], None]] = {
    "grass": _paint_grass,
    "sand": _paint_sand,
    "water": _paint_water,
    "bricks": _paint_bricks,
    "sky": _paint_sky,
    "wood": _paint_wood,
}


def _eyes(board: Board, y: float, gap: float, radius: float) -> None:
    """Two round eyes with a glint."""
    for side in (-1, 1):
        board.oval(side * gap, y, radius, radius * 1.15, INK)
        board.oval(side * gap + radius * 0.3, y - radius * 0.4, radius * 0.32, fill=PAPER)


def _toby(board: Board) -> None:
    """An orange bear cub: round ears, a blue and white striped hat, pink cheeks, freckles on the belly."""
    fur, rim = (238, 140, 48), (146, 76, 22)
    for side in (-1, 1):
        board.oval(side * 0.62, -0.3, 0.26, fill=rim)
        board.oval(side * 0.62, -0.3, 0.19, fill=(252, 206, 150))
    board.oval(0, 0.72, 0.6, 0.46, rim)
    board.oval(0, 0.72, 0.53, 0.39, fur)
    board.oval(0, 0.06, 0.8, 0.64, rim)
    board.oval(0, 0.06, 0.73, 0.57, fur)
    _cone_hat(board)
    _eyes(board, -0.02, 0.28, 0.09)
    for side in (-1, 1):
        board.oval(side * 0.47, 0.24, 0.14, 0.1, (244, 110, 120))
    board.oval(0, 0.26, 0.24, 0.18, (252, 222, 178))
    board.oval(0, 0.2, 0.09, 0.06, INK)
    board.arc(0, 0.24, 0.11, 0.1, (20, 160), 0.055)
    for x, y in ((-0.28, 0.8), (0.0, 0.84), (0.28, 0.8), (-0.15, 0.99), (0.15, 0.99)):
        board.oval(x, y, 0.075, fill=(252, 222, 178))


def _cone_hat(board: Board) -> None:
    """A pointed hat with level stripes and a red bobble."""
    cone = [(-0.42, -0.4), (0.42, -0.4), (0.0, -1.18)]
    board.shape([(x * 1.14, y * 1.03) for x, y in cone], (24, 44, 110))

    def stripes(sheet: Board) -> None:
        sheet.box(-1, -1.4, 1, 0, fill=PAPER)
        for i in range(4):
            sheet.box(-1, -1.12 + 0.2 * i, 1, -1.02 + 0.2 * i, fill=(44, 84, 210))

    board.clipped(lambda sheet: sheet.shape(cone, INK), stripes)
    board.oval(0, -1.18, 0.14, fill=(216, 44, 52))


def _mila(board: Board) -> None:
    """A violet cat: pointed ears, a yellow bow with red dots, whiskers, a white chin."""
    fur, rim = (150, 104, 206), (74, 44, 118)
    for side in (-1, 1):
        board.shape([(side * 0.9, -1.0), (side * 0.2, -0.55), (side * 0.86, -0.05)], rim)
        board.shape([(side * 0.82, -0.84), (side * 0.34, -0.5), (side * 0.78, -0.14)], (244, 170, 200))
    board.oval(0, 0.1, 0.92, 0.78, rim)
    board.oval(0, 0.1, 0.85, 0.71, fur)
    board.oval(0, 0.4, 0.44, 0.34, PAPER)
    for side in (-1, 1):
        board.oval(side * 0.36, -0.06, 0.17, 0.19, (224, 238, 110))
        board.oval(side * 0.36, -0.06, 0.06, 0.17, INK)
        for tilt in (-0.1, 0.12):
            board.stroke([(side * 0.38, 0.32 + tilt * 0.5), (side * 1.04, 0.26 + tilt * 1.6)], 0.06)
    board.shape([(-0.11, 0.18), (0.11, 0.18), (0.0, 0.31)], (226, 92, 130))
    for side in (-1, 1):
        board.arc(side * 0.12, 0.36, 0.13, 0.11, (10, 170), 0.055)
        board.shape([(0, 0.88), (side * 0.46, 0.68), (side * 0.46, 1.1)], (250, 210, 56))
        for x, y in ((0.2, 0.88), (0.37, 0.78), (0.37, 0.98)):
            board.oval(side * x, y, 0.075, fill=(214, 44, 52))
    board.oval(0, 0.88, 0.11, fill=(232, 160, 30))


def _pip(board: Board) -> None:
    """A teal robot: square head, one antenna, lit buttons, a grille for a mouth, riveted corners."""
    metal, rim = (66, 178, 172), (22, 84, 86)
    board.stroke([(0, -0.7), (0, -1.05)], 0.08, rim)
    board.oval(0, -1.1, 0.15, fill=(250, 206, 50))
    board.box(-0.5, 0.4, 0.5, 1.05, 0.1, rim)
    board.box(-0.43, 0.46, 0.43, 0.98, 0.08, (182, 206, 210))
    for x, fill in ((-0.24, (222, 48, 48)), (0.0, (250, 206, 50)), (0.24, (52, 178, 74))):
        board.oval(x, 0.64, 0.1, fill=fill)
    for i in range(4):
        board.box(-0.31 + 0.18 * i, 0.79, -0.22 + 0.18 * i, 0.92, fill=rim)
    board.box(-0.88, -0.72, 0.88, 0.46, 0.22, rim)
    board.box(-0.8, -0.64, 0.8, 0.38, 0.18, metal)
    for side in (-1, 1):
        board.oval(side * 0.36, -0.24, 0.22, fill=PAPER)
        board.oval(side * 0.36, -0.24, 0.12, fill=(30, 60, 160))
        for y in (-0.53, 0.27):
            board.oval(side * 0.68, y, 0.065, fill=rim)
    board.box(-0.42, 0.08, 0.42, 0.28, 0.05, INK)
    for i in range(4):
        board.box(-0.36 + 0.2 * i, 0.12, -0.24 + 0.2 * i, 0.24, fill=(214, 236, 236))


def _zuzu(board: Board) -> None:
    """A round penguin: navy back, white belly, pink and green striped scarf, orange beak, star badge."""
    coat, rim = (52, 66, 112), (22, 28, 56)
    for side in (-1, 1):
        board.oval(side * 0.3, 1.0, 0.24, 0.12, (244, 150, 40))
        board.oval(side * 0.82, 0.3, 0.18, 0.42, rim)
    board.oval(0, 0.08, 0.82, 0.98, rim)
    board.oval(0, 0.08, 0.75, 0.91, coat)
    board.oval(0, 0.4, 0.52, 0.54, PAPER)
    board.oval(-0.26, -0.34, 0.28, 0.3, PAPER)
    board.oval(0.26, -0.34, 0.28, 0.3, PAPER)
    _eyes(board, -0.34, 0.24, 0.1)
    board.shape([(-0.17, -0.22), (0.17, -0.22), (0.0, 0.0)], (244, 150, 40))

    def knit(sheet: Board) -> None:
        sheet.box(-1.2, -1, 1.2, 1.2, fill=(240, 96, 150))
        for i in range(-4, 5):
            sheet.box(0.28 * i - 0.07, -1, 0.28 * i + 0.07, 1.2, fill=(104, 200, 110))

    def scarf(sheet: Board) -> None:
        sheet.box(-0.76, 0.04, 0.76, 0.32, 0.1)
        sheet.box(0.28, 0.1, 0.6, 0.74, 0.06)

    board.clipped(scarf, knit)
    board.shape([(0.22 * x - 0.18, 0.22 * y + 0.6) for x, y in _OUTLINES["star"]], (250, 200, 40))


def _nori(board: Board) -> None:
    """A green one-eyed monster: two horns, a toothy grin, dark spots, a ringed eye."""
    skin, rim = (112, 196, 76), (40, 92, 34)
    for side in (-1, 1):
        board.shape([(side * 0.3, -0.6), (side * 0.66, -0.42), (side * 0.74, -1.12)], (250, 230, 180))
        board.stroke([(side * 0.44, -0.68), (side * 0.68, -0.72)], 0.05, (200, 140, 70))
        board.stroke([(side * 0.55, -0.86), (side * 0.72, -0.88)], 0.05, (200, 140, 70))
    board.box(-0.86, -0.7, 0.86, 1.0, 0.6, rim)
    board.box(-0.79, -0.63, 0.79, 0.93, 0.54, skin)
    for x, y, r in (
        (-0.56, 0.1, 0.1),
        (-0.62, -0.16, 0.06),
        (0.6, 0.0, 0.09),
        (0.5, -0.34, 0.06),
        (0.0, 0.82, 0.07),
    ):
        board.oval(x, y, r, fill=(58, 130, 50))
    board.oval(0, -0.14, 0.36, fill=PAPER)
    board.oval(0, -0.14, 0.23, fill=(220, 80, 40))
    board.oval(0, -0.14, 0.12, fill=INK)
    board.oval(0.07, -0.21, 0.05, fill=PAPER)
    board.box(-0.5, 0.36, 0.5, 0.66, 0.14, (96, 24, 40))
    for i in range(4):
        x = -0.42 + 0.22 * i
        board.shape([(x, 0.37), (x + 0.18, 0.37), (x + 0.09, 0.53)], PAPER)


_SUBJECT_DRAWINGS: dict[str, Callable[[Board], None]] = {
    "toby": _toby,
    "mila": _mila,
    "pip": _pip,
    "zuzu": _zuzu,
    "nori": _nori,
}
