"""The sheet that objects of the demo world are drawn on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageChops, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (44, 36, 40)
PAPER: Colour = (250, 248, 244)


class Board:
    """A supersampled transparent sheet; coordinates in radii, y downwards, the object's middle at (0, 0)."""

    def __init__(self, pixels_per_radius: float, offset: Point, side: int) -> None:
        self.scale = pixels_per_radius
        self.offset = offset
        self.sheet = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.sheet)

    def pixel(self, x: float, y: float) -> Point:
        """Board pixel of a point in radii."""
        return (self.offset[0] + x * self.scale, self.offset[1] + y * self.scale)

    def oval(self, x: float, y: float, rx: float, ry: float | None = None, fill: Colour = INK) -> None:
        """Fill an axis-aligned ellipse."""
        ry = rx if ry is None else ry
        self.pen.ellipse([self.pixel(x - rx, y - ry), self.pixel(x + rx, y + ry)], fill=fill)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, round_: float = 0.0, fill: Colour = INK
    ) -> None:
        """Fill a rectangle with rounded corners."""
        self.pen.rounded_rectangle([self.pixel(x0, y0), self.pixel(x1, y1)], round_ * self.scale, fill=fill)

    def shape(self, points: Sequence[Point], fill: Colour = INK) -> None:
        """Fill a polygon."""
        self.pen.polygon([self.pixel(x, y) for x, y in points], fill=fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour = INK) -> None:
        """Draw a line through points with round joints."""
        pixels = [self.pixel(x, y) for x, y in points]
        self.pen.line(pixels, fill=fill, width=max(1, round(width * self.scale)), joint="curve")

    def arc(
        self, x: float, y: float, rx: float, ry: float, span: Point, width: float, fill: Colour = INK
    ) -> None:
        """Draw a part of an ellipse; angles in degrees, clockwise from the right."""
        edges = [self.pixel(x - rx, y - ry), self.pixel(x + rx, y + ry)]
        self.pen.arc(edges, *span, fill=fill, width=max(1, round(width * self.scale)))

    def clipped(self, outline: Callable[[Board], None], paint: Callable[[Board], None]) -> None:
        """Draw ``paint`` only where ``outline`` draws."""
        masked, painted = self.blank(), self.blank()
        outline(masked)
        paint(painted)
        alpha = ImageChops.multiply(masked.sheet.getchannel("A"), painted.sheet.getchannel("A"))
        painted.sheet.putalpha(alpha)
        self.sheet.alpha_composite(painted.sheet)

    def blank(self) -> Board:
        """An empty board of the same geometry."""
        return Board(self.scale, self.offset, self.sheet.width)
