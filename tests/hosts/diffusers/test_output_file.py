"""The LoRA's file: its name on every system, reserved and known to be writable before a run, and honest errors after it."""

from __future__ import annotations

import os
import sys

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError, StorageError
from blockskip_pack.blockskip_core.hosts.diffusers import RunFiles
from blockskip_pack.blockskip_core.hosts.diffusers.output_file import OutputFile


@pytest.mark.parametrize(
    ("name", "instead"),
    [("con/x", "_con/x"), ("aux.x/y", "_aux.x/y"), ("a./b", "a/b"), ("x/NUL", "x/_NUL"), ("a.", "a")],
)
def test_a_name_that_windows_refuses_or_changes(name, instead):
    with pytest.raises(InvalidInputError, match=f"Use a name such as {instead}[.]$"):
        RunFiles(output_name=name)
    assert RunFiles(output_name=instead).output_name == instead


def test_two_runs_at_once_have_two_files_and_leave_nothing(tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "x_00001.safetensors").touch()
    with OutputFile(tmp_path, "loras/x") as first, OutputFile(tmp_path, "loras/x") as second:
        assert [file.path.name for file in (first, second)] == ["x_00002.safetensors", "x_00003.safetensors"]
        assert first.renew() == first.path
        first.path.touch()  # by another program
        assert first.renew().name == "x_00004.safetensors"
    with OutputFile(tmp_path, "loras/x") as third:
        assert third.path.name == "x_00003.safetensors"
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == [
        "x_00001.safetensors",
        "x_00002.safetensors",
    ]


def test_a_name_that_only_another_run_has_reserved_is_free_once_that_run_is_dropped(tmp_path):
    dropped = OutputFile(tmp_path, "x")
    del dropped
    with OutputFile(tmp_path, "x") as file:
        assert file.path.name == "x_00001.safetensors"


def test_what_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(StorageError, match="could not be created"):
        OutputFile(tmp_path, "taken/x")
    with pytest.raises(StorageError, match="Choose a shorter name"):
        OutputFile(tmp_path, "x" * 300)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_output_folder(tmp_path):
    for name in ("output", "elsewhere"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "output" / "loras")
    with pytest.raises(
        InvalidInputError, match="deep leads to .*elsewhere.deep, outside .*output, and nothing is written"
    ):
        OutputFile(tmp_path / "output", "loras/deep/x")
    assert list((tmp_path / "elsewhere").iterdir()) == []
