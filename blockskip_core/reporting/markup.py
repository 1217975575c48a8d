"""Build HTML and SVG from nested calls. Text is escaped unless it is already markup, so no caller can forget it."""

from __future__ import annotations

import html
import math
import unicodedata

VOID = {"img", "meta"}  # HTML elements without content
SVG_SHAPES = {"circle", "line", "path", "rect"}  # may be self-closing in HTML, because they are foreign elements


class Markup(str):
    """Text that is already markup."""


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return ``<tag attributes>children</tag>``, well-formed as HTML and as XML.

    Children that are not :class:`Markup` are escaped, and so are all attributes. In attribute names underscores become
    hyphens, and a trailing underscore is dropped (``class_``).
    """
    names = {name.removesuffix("_").replace("_", "-"): value for name, value in attributes.items()}
    start = tag + "".join(f' {name}="{escaped(value)}"' for name, value in names.items())
    if tag in VOID or (tag in SVG_SHAPES and not children):
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{joined(*children)}</{tag}>")


def joined(*children: object) -> Markup:
    """Return markup and text concatenated, with the text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def escaped(value: object) -> str:
    """Return a value as text that is safe between tags and in quotes; forbidden characters become U+FFFD."""
    return html.escape("".join(character if _is_allowed(character) else "\ufffd" for character in str(value)))


def place(value: float) -> str:
    """Return a coordinate with at most one decimal.

    Raises:
        ValueError: If it is not finite; browsers would drop the whole drawing.
    """
    if not math.isfinite(value):
        raise ValueError(f"A coordinate must be finite, got {value}.")
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _is_allowed(character: str) -> bool:
    """Return whether XML and UTF-8 allow a character: no controls, lone surrogates or non-characters."""
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and ord(character) & 0xFFFE != 0xFFFE
