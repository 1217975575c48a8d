"""Decodes a caption file to text, whatever encoding the editor used."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from ..errors import InvalidInputError

_MARKS = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
"""Invisible characters: byte order marks, joiners, and direction marks."""
_BLANK = _MARKS + "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
GUESS = "cp1252"
"""The Windows encoding for Western languages; nearly any file can be decoded with it."""


@dataclass(frozen=True)
class CaptionText:
    """A decoded caption.

    Attributes:
        text: Without invisible characters and spaces around it; lines end with "\\n".
        guessed: Whether the encoding is uncertain, because it cannot be recognised.
    """

    text: str
    guessed: bool


def caption_text(content: bytes) -> CaptionText:
    """Return the text of a file: UTF-8 with or without a byte order mark, UTF-16 with one, otherwise Windows-1252.

    Raises:
        InvalidInputError: If it is none of these. The message lacks the file's name, which the caller puts in front.
    """
    try:
        text, guessed = _decoded(content)
    except UnicodeDecodeError as error:
        raise InvalidInputError(_ADVICE) from error
    if any(ord(char) < ord(" ") and not char.isspace() for char in text):
        raise InvalidInputError(_ADVICE)
    return CaptionText(text.replace("\r\n", "\n").replace("\r", "\n").strip(_BLANK), guessed)


_ADVICE = "is not text in UTF-8, UTF-16 or Windows-1252. Save it as plain text in UTF-8."


def _decoded(content: bytes) -> tuple[str, bool]:
    """Return the text, and whether its encoding was guessed."""
    if content.startswith(_UTF_16):
        return content.decode("utf-16"), False
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode(GUESS), True
