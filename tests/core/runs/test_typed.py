"""A dataclass from JSON has the types that it declares, or there is a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.runs.typed import from_json


@dataclass(frozen=True, kw_only=True)
class Given:
    count: int
    size: float = 1.0
    on: bool = False
    kind: Literal["a", "b"] = "a"
    words: Sequence[str] = ()
    numbers: tuple[int, ...] = ()
    note: str | None = None


def test_values_are_taken():
    content = {"count": 3, "size": 2, "on": True, "kind": "b", "words": ["x"], "numbers": [1, 2], "note": None}
    found = from_json(Given, content, "it")
    assert found == Given(count=3, size=2.0, on=True, kind="b", words=("x",), numbers=(1, 2))
    assert isinstance(found.size, float)
    assert from_json(Given, {}, "it", without=["count"], count=7).count == 7


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "it must be a JSON object, got a list"),
        ({}, "it has no count"),
        ({"count": 1, "more": 2}, "it has more, which this version does not know"),
        ({"count": "1"}, "count in it must be a int, got '1'"),
        ({"count": True}, "count in it must be a int, got True"),
        ({"count": 1.0}, "count in it must be a int, got 1.0"),
        ({"count": 1, "size": "2"}, "size in it must be a float"),
        ({"count": 1, "size": True}, "size in it must be a float"),
        ({"count": 1, "on": 1}, "on in it must be a bool"),
        ({"count": 1, "kind": "c"}, "kind in it must be one of a, b, got 'c'"),
        ({"count": 1, "kind": ["a"]}, "kind in it must be one of a, b"),
        ({"count": 1, "words": "xy"}, "words in it must be a list, got a str"),
        ({"count": 1, "numbers": [1, "2"]}, "numbers in it must be a int, got '2'"),
        ({"count": 1, "note": 2}, "note in it must be a str, got 2"),
        ({"count": None}, "count in it must be a int, got None"),
    ],
)
def test_anything_else_is_refused(content, sentence):
    with pytest.raises(InvalidInputError, match=sentence):
        from_json(Given, content, "it")


def test_a_field_that_is_left_out_must_not_be_there():
    with pytest.raises(InvalidInputError, match="it has count, which this version does not know"):
        from_json(Given, {"count": 1}, "it", without=["count"], count=7)
