"""Captions as written by editors."""

from __future__ import annotations

import pytest
from blockskip_pack.blockskip_core.data.caption_text import caption_text
from blockskip_pack.blockskip_core.errors import InvalidInputError
from hypothesis import given
from hypothesis import strategies as st

WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30)
BLANKS = st.text(" \t\r\n\u00a0\u3000\ufeff\u200b", max_size=5)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])


@given(words=WORDS, before=BLANKS, after=BLANKS, encoding=ENCODINGS)
def test_the_words_are_read_and_nothing_around_them(words, before, after, encoding):
    read = caption_text(f"{before}{words}{after}".encode(encoding))
    assert (read.text, read.guessed) == (words, False)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_both_orders_of_bytes_are_read(encoding):
    assert caption_text("\ufeffgrüner Hund".encode(encoding)).text == "grüner Hund"


@given(blank=BLANKS, encoding=ENCODINGS)
def test_blank_is_empty(blank, encoding):
    assert caption_text(blank.encode(encoding)).text == ""


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_western_letters_are_read_and_said_to_be_a_guess(encoding):
    read = caption_text("ein grüner Hund, très beau\r\nà côté\r\n".encode(encoding))
    assert (read.text, read.guessed) == ("ein grüner Hund, très beau\nà côté", True)


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n\0\0", "a dog".encode("utf-16-le"), b"a\0b", b"caf\x81", b"\xff\xfea"],
    ids=["a picture", "UTF-16 without its mark", "a zero", "no text of any kind", "half of UTF-16"],
)
def test_what_is_no_text_is_refused(content):
    with pytest.raises(InvalidInputError, match="is not text in UTF-8, UTF-16 or Windows-1252. Save it as plain text"):
        caption_text(content)


@given(content=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(content):
    try:
        text = caption_text(content).text
    except InvalidInputError:
        return
    assert text == text.strip()
    assert not text.startswith("\ufeff")
