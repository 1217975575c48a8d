"""Files that exist completely or not at all, and the hierarchy of errors."""

import inspect
import os
import re
import time
from contextlib import contextmanager

import pytest
import torch
from blockskip_pack.blockskip_core import errors
from blockskip_pack.blockskip_core import files as atomic_files
from blockskip_pack.blockskip_core.files import open_tensors, remove_leftovers, write_atomically
from safetensors import SafetensorError
from safetensors.torch import save_file


def test_the_file_is_written_under_another_name_first(tmp_path):
    seen = []

    def write(path):
        path.write_text("new")
        seen.append((path.parent, path.name, (tmp_path / "file.txt").exists()))

    write_atomically(tmp_path / "file.txt", write)
    ((folder, name, was_there),) = seen
    assert (folder, was_there) == (tmp_path, False)
    assert re.fullmatch(r"file\.txt\.[0-9a-f]{8}\.part", name)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "new"


@pytest.mark.parametrize(
    "problem",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
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


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(2, "No such file or directory"), "Its folder was removed or renamed meanwhile"),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), "Its folder was removed or renamed"),
        (OSError(13, "Permission denied"), "Close the program that has it open"),
        (OSError(27, "File too large"), "Free some disk space"),
        (OSError(30, "Read-only file system"), "That disk can only be read"),
        (OSError(5, "Input/output error"), "Look whether the disk is full or damaged"),
        (SafetensorError("something else"), "Look whether the disk is full or damaged"),
    ],
)
def test_the_advice_is_about_the_cause(error, advice):
    assert atomic_files.what_helps(error).startswith(advice)


def test_two_writers_of_one_file_have_two_temporary_ones(tmp_path):
    """The last writer wins, and both files are complete at every moment."""

    def write(path):
        path.write_text("first, half of it")
        write_atomically(tmp_path / "file.txt", lambda path: path.write_text("second"))
        path.write_text("first")

    write_atomically(tmp_path / "file.txt", write)
    assert (tmp_path / "file.txt").read_text() == "first"
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
        "PatchAdapterError",
        "LoraFileError",
        "TrainingError",
    }
    for kind in family:
        assert issubclass(kind, errors.BlockSkipError)
        assert issubclass(kind, ValueError)
        assert kind.__name__ in errors.__doc__ or kind is errors.BlockSkipError


def test_a_folder_that_is_not_there_is_made(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file.txt", lambda path: path.write_text("x"))
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "x"


def test_a_name_that_no_file_can_have_is_said(tmp_path):
    """The temporary file cannot be removed either, for the same reason; that is not the error that is reported."""
    with pytest.raises(errors.StorageError, match="could not be written: .*File name too long"):
        write_atomically(tmp_path / ("x" * 255), lambda path: path.write_text("x"))


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name, age in (("a.part", 61), ("b.part", 50), ("c.txt", 1000), ("mine.part", 1000)):
        (tmp_path / name).write_text("half")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    remove_leftovers(tmp_path, lambda name: name.endswith(".part") and name != "mine.part")
    assert sorted(os.listdir(tmp_path)) == ["b.part", "c.txt", "mine.part"]
    remove_leftovers(tmp_path / "nowhere", lambda name: True)  # raises nothing


def test_a_file_that_the_system_does_not_open_is_not_told_to_be_missing(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "b.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"12")
    with pytest.raises(SafetensorError):
        open_tensors(tmp_path / "half.safetensors")
    with too_many_open_files(), pytest.raises(OSError, match="Too many open files") as caught:
        open_tensors(tmp_path / "a.safetensors")
    assert not isinstance(caught.value, FileNotFoundError)


@contextmanager
def too_many_open_files():
    """Make this process unable to open files."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_another_program_reads_gets_its_name_a_little_later(tmp_path, monkeypatch):
    """Windows refuses to replace an open file."""
    path, waits, replace = tmp_path / "file.txt", [], os.replace

    def refuse_twice(source, target):
        if len(waits) < 2:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(atomic_files, "_WAITS_S", (0.1, 0.2, 0.4))
    monkeypatch.setattr(atomic_files.time, "sleep", waits.append)
    monkeypatch.setattr(atomic_files.os, "replace", refuse_twice)
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert (path.read_text(), waits) == ("new", [0.1, 0.2])


def test_a_file_that_stays_open_elsewhere_is_not_blamed_on_a_full_disk(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(atomic_files.os, "replace", refuse)
    with pytest.raises(errors.StorageError, match="Close the program that has it open"):
        write_atomically(tmp_path / "file.txt", lambda temporary: temporary.write_text("new"))
    assert os.listdir(tmp_path) == []
