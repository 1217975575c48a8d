"""Files that are there whole or not at all, and the family of errors."""

import inspect
import os

import pytest
from blockskip_pack.blockskip_core import atomic_files, errors
from blockskip_pack.blockskip_core.atomic_files import write_atomically
from safetensors import SafetensorError


def test_the_file_is_written_under_another_name_first(tmp_path):
    seen = []

    def write(path):
        path.write_text("new")
        seen.append((path.parent, path.name, (tmp_path / "file.txt").exists()))

    write_atomically(tmp_path / "file.txt", write)
    assert seen == [(tmp_path, "file.txt.part", False)]
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "new"


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise problem

    with pytest.raises(errors.StorageError, match=r"file.txt could not be written: .*Free some disk space") as caught:
        write_atomically(path, write)
    assert caught.value.__cause__ is problem
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_interrupt_leaves_the_old_file_and_passes(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_disk_is_flushed_before_the_file_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(atomic_files.os, "fsync", lambda _: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(atomic_files.os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_atomically(tmp_path / "file.txt", lambda path: path.write_text("x"))
    assert calls == ["fsync", "replace"]


def test_every_error_is_a_value_error_of_one_family():
    family = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert {kind.__name__ for kind in family} == {
        "BlockSkipError",
        "InvalidInputError",
        "UnsupportedModelError",
        "CacheError",
        "CheckpointError",
        "StorageError",
        "LoraFileError",
        "TrainingError",
    }
    for kind in family:
        assert issubclass(kind, errors.BlockSkipError)
        assert issubclass(kind, ValueError)
        assert kind.__name__ in errors.__doc__ or kind is errors.BlockSkipError
