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
    assert folders.file(name) == folders.folders[1] / "sub" / "b.bin"


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
    assert folders.file("link/b.bin") == folders.folders[0] / "link" / "b.bin"
    with pytest.raises(InvalidInputError, match="out/secret is a link to .*, outside the folders named with --models"):
        folders.file("out/secret")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_keeps_its_own_name_and_folder(folders):
    """The hub's cache stores every file under its hash, and links to it from the folder of a model."""
    blob = folders.folders[1] / "0123abcd"
    blob.write_text("weights")
    os.symlink(blob, folders.folders[0] / "model.safetensors")
    found = folders.file("model.safetensors")
    assert (found.name, found.parent, found.read_text()) == ("model.safetensors", folders.folders[0], "weights")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_all_that_is_read_of_a_folder_is_inside(folders, tmp_path):
    blobs, model = folders.folders[1] / "sub", folders.folders[0] / "model"
    (model / "part").mkdir(parents=True)
    for link in ("index.json", "part/weights.bin"):
        os.symlink(blobs / "b.bin", model / link)
    os.symlink(tmp_path / "secret", model / "unread")
    assert folders.folder_with("model", "index.json", "part", "absent") == model
    os.symlink(tmp_path / "secret", model / "part" / "more.bin")
    with pytest.raises(
        InvalidInputError, match="model/part/more.bin is a link to .*, outside the folders named with --models"
    ):
        folders.folder_with("model", "index.json", "part")
    os.symlink(tmp_path, model / "whole")
    with pytest.raises(InvalidInputError, match="model/whole is a link to .*, outside the folders named with --models"):
        folders.folder_with("model", "index.json", "whole")


def test_without_folders_there_is_nothing():
    with pytest.raises(
        InvalidInputError, match=r"There is no file x in the folders named with --data \(none are named\)"
    ):
        NamedFolders([], "--data").file("x")
