"""File names mean the same on every system, checked with pathlib's knowledge of Windows."""

import ntpath
import re
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("comfyui")


def name_below(text):
    from blockskip_pack.blockskip_core.hosts.files.names import name_below

    return name_below(text, "loras/my_lora")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("toy", "toy"), ("loras/toy", "loras/toy"), ("loras\\toy", "loras/toy"), ("a\\b/c", "a/b/c"), ("loras/", "loras"), ("./a//b", "a/b"),
     ("my lora v1.2", "my lora v1.2"), (".hidden", ".hidden"), ("-rf", "-rf"), ("~/x", "~/x"), ("%2e%2e/x", "%2e%2e/x"),
     ("Grüße/日本", "Grüße/日本"), ("console", "console"), ("com10", "com10"), ("%year%/x", "%year%/x")],
)  # fmt: skip
def test_plain_names_are_taken_and_both_separators_separate(typed, meant):
    assert name_below(typed) == PurePosixPath(meant)


@pytest.mark.parametrize(
    "typed",
    ["../x", "..\\x", "a/../x", "a\\..\\x", "..", "/etc/x", "\\x", "\\\\host\\share\\x", "//host/share/x", "C:\\x", "c:x",
     "C:/x", "\\\\?\\C:\\x", "\\\\.\\con"],
)  # fmt: skip
def test_what_leaves_the_folder_on_any_system_is_refused(typed):
    with pytest.raises(InvalidInputError, match="must stay inside ComfyUI's output folder.* Use a plain name such as"):
        name_below(typed)


@pytest.mark.parametrize("typed", ["", ".", "./."])
def test_what_names_no_file_is_refused(typed):
    with pytest.raises(InvalidInputError, match="names no file"):
        name_below(typed)


@pytest.mark.parametrize(
    ("typed", "instead"),
    [("my:lora", "my_lora"), ("loras/what?", "loras/what_"), ('a"b<c>d|e*f', "a_b_c_d_e_f"), ("toy ", "toy"),
     (" toy", "toy"), ("toy.", "toy"), ("loras /toy", "loras/toy"), ("a./b", "a/b"), ("...", "_"), ("con", "_con"),
     ("loras\\NUL", "loras/_NUL"), ("aux/x", "_aux/x"), ("COM1.safetensors", "_COM1.safetensors"), ("lpt²", "_lpt²"),
     ("con .txt", "_con .txt")],
)  # fmt: skip
def test_what_windows_refuses_or_changes_is_refused_and_a_name_offered_that_works(typed, instead):
    with pytest.raises(InvalidInputError) as refusal:
        name_below(typed)
    offered = re.fullmatch(r".* Use a name such as (.*)\.", str(refusal.value))[1]
    assert offered == instead
    assert str(name_below(offered)) == offered


@pytest.mark.parametrize("typed", ["a\x00b", "a\nb", "a\x7fb", "\u202etxt", "\t"])
def test_control_characters_are_refused(typed):
    with pytest.raises(InvalidInputError, match="must not contain control characters"):
        name_below(typed)


pieces = st.sampled_from(
    ["..", ".", "/", "\\", ":", "con", "NUL", "com¹", " ", "x", "C:", "a.b", "?", "~", "\u202e", "é", "$"]
)


@settings(derandomize=True, deadline=None, max_examples=500)  # a busy machine is slow
@given(st.lists(pieces, max_size=7).map("".join))
@example("x/con")
@example("CONIN$")
def test_whatever_is_typed_is_refused_or_stays_below_the_folder_on_windows_and_elsewhere(typed):
    try:
        name = name_below(typed)
    except InvalidInputError:
        return
    for root in (PurePosixPath("/out"), PureWindowsPath("C:\\out")):
        path = root / str(name)
        assert path.is_relative_to(root)
        assert ".." not in path.parts
        assert path.parts[len(root.parts) :] == name.parts
    windows = PureWindowsPath(str(name))
    assert not windows.drive
    assert not windows.root
    for part in windows.parts:
        assert not PureWindowsPath(part).is_reserved()
        assert part == part.rstrip(" .")
    assert ntpath.normpath(str(name)) == str(windows)
