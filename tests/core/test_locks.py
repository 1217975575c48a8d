"""Locks between processes: a holder keeps others out as long as it lives, and no longer."""

import errno
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from blockskip_pack.blockskip_core import locks as own_system
from blockskip_pack.blockskip_core.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]
LONGEST_WAIT_S = 60

# A process that locks a target and reports it; then it waits, or lets a forked child wait.
HOLDER = """
import os, sys, time
from pathlib import Path
from types import ModuleType
package = sys.modules["blockskip_core"] = ModuleType("blockskip_core")  # without what it imports, which takes seconds
package.__path__ = [str(Path(sys.argv[1]) / "blockskip_core")]
from blockskip_core.locks import try_lock
held = try_lock(Path(sys.argv[2]), shared=sys.argv[3] == "shared")
ready, begun = os.pipe()
child = os.fork() if sys.argv[4] == "fork" else None
if child == 0:
    sys.stdout.close()
    os.write(begun, b".")
    time.sleep(600)
if child:
    os.read(ready, 1)  # the child is past what it does at its start
print("held" if held else "refused", child, flush=True)
time.sleep(600)
"""


def in_windows():
    """The module as it works on Windows, whose byte locks are simulated by those of Linux.

    Both belong to the open file. A difference is simulated too: Windows does not remove open files.
    """
    fcntl = pytest.importorskip("fcntl")
    if not hasattr(fcntl, "F_OFD_SETLK"):
        pytest.skip("this system has no byte locks of an opened file")
    import struct

    def locking(descriptor, mode, count):
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    name = "blockskip_pack.blockskip_core.locks_in_windows"
    spec = importlib.util.spec_from_file_location(name, own_system.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        patch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
        spec.loader.exec_module(module)

    remove = module._remove

    def remove_unless_open(path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            locking(descriptor, 2, 64)
            remove(path)
        finally:
            os.close(descriptor)

    module._remove = remove_unless_open
    return module


@pytest.fixture(params=["own system", "windows"])
def locks(request):
    """The module as it works here, and as it works on Windows."""
    return own_system if request.param == "own system" else in_windows()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "residuals" / "ab12"


@pytest.fixture
def holder(target):
    """A function that starts a process that locks the target."""
    started = []

    def start(kind="alone", then="wait"):
        command = [sys.executable, "-c", HOLDER, str(ROOT), str(target), kind, then]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.said, child = process.stdout.readline().split()
        process.child = None if child == "None" else int(child)
        return process

    yield start
    for process in started:
        for number in filter(None, (process.child, process.pid)):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        process.stdout.close()


def never():
    raise AssertionError("nobody else has it")


def lock_file(target):
    return target.with_name(target.name + ".lock")


# --- in one process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_only_readers_go_together(locks, target, first, second):
    with locks.try_lock(target, shared=first):
        other = locks.try_lock(target, shared=second)
        assert (other is not None) == (first and second)
        if other:
            other.release()
    assert locks.try_lock(target, shared=second), "and afterwards everybody may"


def test_a_writer_waits_for_the_last_reader(locks, target):
    readers = [locks.try_lock(target, shared=True) for _ in range(5)]
    for reader in readers:
        assert locks.try_lock(target) is None
        reader.release()
    with locks.try_lock(target):
        assert locks.try_lock(target, shared=True) is None


def test_targets_have_nothing_to_do_with_each_other(locks, target):
    with locks.try_lock(target), locks.try_lock(target.with_name("ab13")), locks.try_lock(target / "inside"):
        pass


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_left_behind(locks, target, shared):
    held = locks.try_lock(target, shared=shared)
    assert os.listdir(target.parent) == ["ab12.lock"]
    held.release()
    held.release()
    assert os.listdir(target.parent) == []


def test_the_file_of_a_lock_stays_while_another_reads(locks, target):
    with locks.try_lock(target, shared=True):
        locks.try_lock(target, shared=True).release()
        assert lock_file(target).exists()
        assert locks.try_lock(target) is None


def test_a_lock_that_nobody_holds_any_more_is_free(locks, target):
    held = locks.try_lock(target)
    del held  # as after an error
    assert locks.try_lock(target)


def test_waiting_is_told_and_can_be_given_up(locks, target, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.0)
    calls = []

    def waiting():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with locks.try_lock(target), pytest.raises(KeyboardInterrupt):
        locks.lock(target, waiting)
    with locks.lock(target, never):
        assert len(calls) == 3


def test_a_lock_comes_as_soon_as_it_is_free(locks, target, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.0)
    held, calls = locks.try_lock(target), []

    def waiting():
        calls.append(1)
        if len(calls) == 3:
            held.release()

    with locks.lock(target, waiting, shared=True):
        assert len(calls) == 3


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(target, monkeypatch):
    """Between opening and locking; the lock would be on a file that nobody else opens again."""
    real, removed = own_system._opened, []

    def opened(path):
        descriptor = real(path)
        if not removed:
            removed.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(own_system, "_opened", opened)
    with own_system.try_lock(target):
        assert lock_file(target).exists()
        assert own_system.try_lock(target) is None


def test_a_drive_where_no_file_is_the_same_twice_is_not_tried_for_ever(target, monkeypatch):
    monkeypatch.setattr(own_system, "_is_still_there", lambda *_: False)
    with own_system.try_lock(target):
        assert own_system.try_lock(target) is None


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of_once_and_used(target, monkeypatch, caplog, code):
    def without(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(own_system, "_lock_descriptor", without)
    monkeypatch.setattr(own_system, "_warned", set())
    for _ in range(3):
        with own_system.try_lock(target), own_system.lock(target, never, shared=True):
            pass
    assert [record.levelno for record in caplog.records if "no file locks" in record.message] == [logging.WARNING]
    assert os.strerror(code) in caplog.text


def test_a_disk_that_refuses_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"ab12\.lock could not be created: .*(Not a directory|File exists)"):
        own_system.try_lock(tmp_path / "file" / "ab12")


def test_what_killed_processes_left_is_removed_and_nothing_else(locks, tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("gone.lock", "there.lock", "used.lock", "text"):
        (tmp_path / name).touch()
    with locks.try_lock(tmp_path / "used"):
        locks.remove_stale_locks(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["text", "there", "there.lock", "used.lock"]
    locks.remove_stale_locks(tmp_path / "nowhere")


def test_threads_keep_each_other_out_as_well(locks, target, monkeypatch):
    """Random readers and writers; a writer is always alone."""
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.001)
    inside, problems, guard = [], [], threading.Lock()

    def work(seed):
        random = Random(seed)
        for _ in range(40):
            shared = random.random() < 0.6
            with locks.lock(target, lambda: None, shared=shared):
                with guard:
                    inside.append(shared)
                    if len(inside) > 1 and not all(inside):
                        problems.append(list(inside))
                with guard:
                    inside.remove(shared)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_WAIT_S)
        assert not thread.is_alive()
    assert problems == []
    assert os.listdir(target.parent) in ([], ["ab12.lock"])


# --- between processes -------------------------------------------------------------------------------------------


def test_another_process_is_kept_out_until_it_is_over(target, holder):
    process = holder()
    assert process.said == "held"
    assert own_system.try_lock(target) is None
    assert own_system.try_lock(target, shared=True) is None
    process.kill()
    process.wait()
    assert lock_file(target).exists(), "it had no time to remove it"
    with own_system.lock(target, never):
        pass
    assert os.listdir(target.parent) == []


def test_two_processes_read(target, holder):
    assert (holder("shared").said, holder("shared").said, holder().said) == ("held", "held", "refused")
    own_system.try_lock(target, shared=True).release()
    assert own_system.try_lock(target) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_keep_the_lock_of_a_parent_that_was_killed(target, holder):
    process = holder(then="fork")
    assert own_system.try_lock(target) is None
    process.kill()
    process.wait()
    os.kill(process.child, 0)  # it lives
    with own_system.lock(target, never):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_that_ends_leaves_the_lock_to_its_parent(target):
    with own_system.try_lock(target) as held:
        child = os.fork()
        if child == 0:
            try:
                held.release()
                os._exit(0 if own_system.try_lock(target) is None else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert own_system.try_lock(target) is None
        assert lock_file(target).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_that_is_killed_frees_its_own_lock(target):
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = own_system.try_lock(target)
            os.write(say, b"held" if held else b"refused")
            threading.Event().wait(LONGEST_WAIT_S)
        finally:
            os._exit(1)
    os.close(say)
    with open(ready, "rb") as answers:
        assert answers.read(4) == b"held"
    assert own_system.try_lock(target) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with own_system.lock(target, never):
        pass
