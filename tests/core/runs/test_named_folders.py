"""Names in run files stay inside the folders that were named, on every system."""

from __future__ import annotations

import os
import sys

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.runs.named_folders import NamedFolders


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / f"{name}.bin").touch()
    (tmp_path / "secret").touch()
    return NamedFolders([tmp_path / "a", tmp_path / "b"], "--models")


@pytest.mark.parametrize("name", ["sub/b.bin", "sub\\b.bin"])
def test_a_plain_name_is_found_in_any_of_them(folders, name):
    assert folders.file(name) == (folders.folders[1] / "sub" / "b.bin").resolve()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret", "sub/../../secret", "sub\\..\\..\\secret", "/secret", "\\secret", "//host/x", "\\\\host\\x",
     "C:secret", "C:/secret", "c:\\secret", "sub/a.bin:stream", "sub//a.bin", "sub/./a.bin", "sub/.. /x", "sub/... /x", "a\0b",
     "sub/a\n.bin", "\u202ea.bin"],
)  # fmt: skip
def test_a_name_that_could_lead_elsewhere(folders, name):
    with pytest.raises(InvalidInputError, match="could lead out of the folders named with --models"):
        folders.file(name)


@pytest.mark.parametrize("name", ["gone", "sub", "~/x"])
def test_a_name_of_no_file(folders, name):
    with pytest.raises(InvalidInputError, match=f"There is no file {name} in the folders named with --models"):
        folders.file(name)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_may_lead_to_another_named_folder_only(folders, tmp_path):
    os.symlink(tmp_path / "b" / "sub", folders.folders[0] / "link")
    os.symlink(tmp_path, folders.folders[0] / "out")
    assert folders.file("link/b.bin") == (tmp_path / "b" / "sub" / "b.bin").resolve()
    with pytest.raises(InvalidInputError, match="out/secret is a link to .*, outside the folders named with --models"):
        folders.file("out/secret")


def test_without_folders_there_is_nothing():
    with pytest.raises(
        InvalidInputError, match=r"There is no file x in the folders named with --data \(none are named\)"
    ):
        NamedFolders([], "--data").file("x")
