"""Exceptions are shown to users under the pack's name, without the path of its folder."""

from __future__ import annotations

from blockskip_pack.blockskip_core import errors


def family():
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ValueError)]


def test_their_full_names_start_with_the_packs_name():
    assert len(family()) == 9
    for kind in family():
        assert f"{kind.__module__}.{kind.__qualname__}" == f"BlockSkip.{kind.__name__}"


def test_exceptions_derived_elsewhere_too():
    class OutOfSomething(errors.BlockSkipError):
        pass

    assert OutOfSomething.__module__ == "BlockSkip"
