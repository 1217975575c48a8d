"""The sources of a run's residuals: disk, chunks, or folded into each step."""

import dataclasses
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core import locks
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.errors import CacheError, InvalidInputError, StorageError
from blockskip_pack.blockskip_core.residuals.cache import (
    MANIFEST,
    CacheIdentity,
    CacheWriter,
    ResidualCache,
    is_finished,
    stored_draws,
)
from blockskip_pack.blockskip_core.residuals.cached_set import WAITING, stored_latents, write_cache
from blockskip_pack.blockskip_core.residuals.housekeeping import KEPT_CACHES, remove_old_caches
from blockskip_pack.blockskip_core.residuals.residual_set import ResidualSet, require_room, residual_bytes
from blockskip_pack.blockskip_core.residuals.sources import ChunkedSource, DiskSource, FoldedSource, source_of

from ..plain_dit import TEXT_LENGTHS, WIDTH, PlainDit, latents, lora_for, schedule, selection, train

PLAN = schedule((0.3, 0.9, 0.55, 0.7, 0.2), (0, 2, 1, 2, 0))


def quiet(phase, done, total):
    pass


def residual_set(
    folder, storage="disk", *, spans=(1, 2), chunk_size=2, dtype="torch.float64", model="m", back_residual="constant"
):
    chosen = selection(*spans)
    identity = CacheIdentity(
        model=model, schedule=PLAN.fingerprint, selection=chosen.fingerprint, pictures="p", captions="c", dtype=dtype,
        back_residual=back_residual,
    )  # fmt: skip
    return ResidualSet(
        schedule=PLAN, latents=latents(len(PLAN)), selection=chosen, captions=(), identity=identity, storage=storage,
        chunk_size=chunk_size, folder=folder / identity.key, family="plain",
        back_residual=back_residual,
    )  # fmt: skip


def run(residuals, *, dit=None, on_step=None, progress=quiet, **settings):
    dit = dit or PlainDit()
    adapters = lora_for(dit, residuals.selection)
    source = source_of(residuals, dit, progress)
    result, _ = train(
        dit, residuals.selection, source, adapters, plan=PLAN, clean=residuals.latents, on_step=on_step, **settings
    )
    return result, adapters


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "settings", [{"batch_size": 2, "steps": 6}, {"accumulation": 3, "steps": 4}], ids=["batch", "accumulate"]
)
def test_chunked_training_is_training_from_disk(tmp_path, chunk_size, settings):
    disk, a = run(residual_set(tmp_path / "disk"), **settings)
    chunked, b = run(residual_set(tmp_path / "chunked", "chunked", chunk_size=chunk_size), **settings)
    assert chunked.losses == disk.losses
    assert chunked.self_check == disk.self_check
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_storage_names_the_source(tmp_path):
    dit = PlainDit()
    kinds = [
        type(source_of(residual_set(tmp_path, storage), dit, quiet)) for storage in ("disk", "chunked", "on the fly")
    ]
    assert kinds == [DiskSource, ChunkedSource, FoldedSource]
    with pytest.raises(InvalidInputError, match="storage must be one of disk, chunked, on the fly, got 'tape'"):
        residual_set(tmp_path, "tape")
    with pytest.raises(InvalidInputError, match="chunk_size must be at least 1, got 0"):
        residual_set(tmp_path, chunk_size=0)


def test_on_the_fly_writes_nothing(tmp_path):
    result, _ = run(residual_set(tmp_path, "on the fly"), steps=3)
    assert len(result.losses) == 3
    assert not list(tmp_path.iterdir())


def test_chunks_hold_no_more_than_their_size_and_are_gone_afterwards(tmp_path):
    residuals, held = residual_set(tmp_path, "chunked", chunk_size=2), []

    def on_step(_):
        (folder,) = tmp_path.glob("*-chunk-*[!k]")
        held.append(len(ResidualCache(folder, residuals.identity)))

    run(residuals, steps=5, on_step=on_step)
    assert held == [2, 2, 2, 2, 1]
    assert list(tmp_path.iterdir()) == []


def mapped(folder):
    """Lines about files of a folder that are mapped into memory, deleted ones too."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return [line for line in lines if str(folder) in line]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads the process's own map")


@needs_proc
@pytest.mark.parametrize("back_residual", ["constant", "linear"])
def test_the_disk_space_of_a_chunk_is_free_when_the_next_is_computed(tmp_path, back_residual):
    residuals = residual_set(tmp_path, "chunked", chunk_size=2, back_residual=back_residual)
    seen = []
    run(residuals, steps=5, progress=lambda phase, done, total: seen.append(mapped(tmp_path)))
    assert len(seen) > 5
    assert not any(seen)


class Interrupt(BaseException):
    """The exception with which a host interrupts a run."""


def test_an_interrupt_removes_the_chunk_that_is_open(tmp_path):
    residuals = residual_set(tmp_path, "chunked")

    def on_step(report):
        assert any(is_finished(path) for path in tmp_path.iterdir())
        raise Interrupt

    with pytest.raises(Interrupt):
        run(residuals, steps=5, on_step=on_step)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["disk", "chunked"])
@pytest.mark.parametrize("problem", [Interrupt, RuntimeError])
def test_precomputing_that_ends_early_leaves_whole_shards_or_nothing(tmp_path, storage, problem):
    residuals, calls = residual_set(tmp_path, storage), []

    def progress(phase, done, total):
        calls.append(done)
        if len(calls) == 7:
            raise problem

    with pytest.raises(problem):
        run(residuals, progress=progress, steps=5)
    left = sorted(path.name for path in residuals.folder.glob("*"))
    assert left == (["shard-00000.safetensors", "unfinished.json"] if storage == "disk" else [])


def test_a_finished_cache_is_not_computed_again(tmp_path):
    residuals, calls = residual_set(tmp_path), []
    write_cache(residuals, PlainDit(), quiet)
    first = run(residuals, steps=5, progress=lambda *report: calls.append(report))[0]
    assert calls == []
    shutil.rmtree(residuals.folder)
    assert run(residuals, steps=5)[0].losses == first.losses  # and recomputed when it is missing


def test_progress_runs_over_all_chunks(tmp_path):
    calls = []
    write_cache(residual_set(tmp_path, chunk_size=2), PlainDit(), lambda *report: calls.append(report))
    assert calls == [("computing residuals", done, 15) for done in range(1, 16)]


@pytest.mark.parametrize("spans", [(1, 2), (2, 0), (0, 2), (0, 0), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_predicted_bytes_are_those_written(tmp_path, spans, dtype):
    dit = PlainDit(dtype=dtype)
    residuals = residual_set(tmp_path, spans=spans, dtype=str(dtype))
    object.__setattr__(residuals, "latents", residuals.latents.to(dtype))
    write_cache(residuals, dit, quiet)
    cache = ResidualCache(residuals.folder, residuals.identity)
    written = sum(x.nbytes for draw in range(len(PLAN)) for x in cache.residual(draw).tensors().values())
    assert residual_bytes(dit, residuals, range(len(PLAN))) == written
    if spans == (1, 2):
        texts = sum(TEXT_LENGTHS[draw.caption] for draw in PLAN)
        assert written == (2 * 6 * len(PLAN) + texts) * WIDTH * dtype.itemsize


def test_a_disk_without_room_is_said_before_the_model_runs(tmp_path):
    dit = PlainDit()
    dit.width = 2**40
    dit.denoise = None
    residuals = residual_set(tmp_path)
    with pytest.raises(InvalidInputError, match=r"would take \d+\.\d\d GiB on disk"):
        write_cache(residuals, dit, quiet)
    chunked = residual_set(tmp_path, "chunked")
    with (
        pytest.raises(InvalidInputError, match="on disk"),
        next(source_of(chunked, dit, quiet).stretches(MicroBatches(steps=3))),
    ):
        pass
    assert not residuals.folder.exists()


def test_stored_latents_come_back_as_they_were(tmp_path):
    residuals = residual_set(tmp_path)
    assert stored_latents(residuals, quiet) is None
    write_cache(residuals, PlainDit(), quiet)
    assert torch.equal(stored_latents(residuals, quiet), residuals.latents)


@needs_proc
def test_latents_of_several_shapes_keep_no_file_open(tmp_path):
    residuals = residual_set(tmp_path)
    clean = [latent[..., : 4 + 2 * (index % 2)] for index, latent in enumerate(residuals.latents)]
    residuals = dataclasses.replace(residuals, latents=clean)
    write_cache(residuals, PlainDit(), quiet)
    found = stored_latents(residuals, quiet)
    assert all(map(torch.equal, found, clean))
    assert not mapped(tmp_path)


def damage(folder):
    shard = next(folder.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def read_everything(residuals):
    stored_latents(residuals, quiet)
    run(residuals, steps=5)


def test_a_damaged_cache_is_removed_and_the_user_told_to_queue_again(tmp_path):
    residuals = residual_set(tmp_path, chunk_size=100)
    write_cache(residuals, PlainDit(), quiet)
    damage(residuals.folder)
    with pytest.raises(CacheError, match="are damaged .* They have been removed; run again"):
        run(residuals, steps=5)
    assert not residuals.folder.exists()
    write_cache(residuals, PlainDit(), quiet)
    damage(residuals.folder)
    with pytest.raises(CacheError, match="They have been removed"):
        read_everything(residuals)
    assert not residuals.folder.exists()


def test_a_cache_of_something_else_under_the_same_name_is_removed(tmp_path):
    residuals, other = residual_set(tmp_path), residual_set(tmp_path, model="other")
    write_cache(other, PlainDit(), quiet)
    other.folder.rename(residuals.folder)
    with pytest.raises(CacheError, match="belong to another model. They have been removed"):
        run(residuals)
    assert not residuals.folder.exists()


def finished_cache(folder, age):
    writer = CacheWriter(folder, residual_set(folder).identity)
    writer.write({0: {"latent": torch.zeros(1)}})
    writer.finish()
    os.utime(folder, (1e9 - age, 1e9 - age))


def test_only_the_newest_caches_stay_and_nothing_else_is_touched(tmp_path):
    for name, age in (("c", 30), ("a", 10), ("d", 40), ("b", 20)):
        finished_cache(tmp_path / name, age)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "picture.png").write_bytes(b"x")
    (tmp_path / "file.txt").write_text("x")
    remove_old_caches(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "file.txt", "holiday"]
    remove_old_caches(tmp_path, keep=0)
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "holiday"]
    remove_old_caches(tmp_path / "nowhere", keep=0)


def test_writing_a_cache_makes_room_for_it_among_the_old_ones(tmp_path):
    for age in range(5):
        finished_cache(tmp_path / f"old-{age}", age)
    residuals = residual_set(tmp_path)
    write_cache(residuals, PlainDit(), quiet)
    caches = {path.name for path in tmp_path.iterdir() if (path / MANIFEST).is_file()}
    assert caches == {residuals.folder.name, "old-0", "old-1"}
    assert len(caches) == KEPT_CACHES


# --- more than one process -----------------------------------------------------------------------------------------
# A lock belongs to an open file, so a lock held by the test keeps the code out like that of another process.


@pytest.fixture
def impatient(monkeypatch):
    """Make every wait short."""
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.0)


@pytest.mark.parametrize("storage", ["disk", "chunked"])
def test_a_cache_that_is_read_is_not_removed(tmp_path, storage):
    folder, seen = tmp_path / "here", []
    residuals = residual_set(folder, storage)

    def on_step(report):
        remove_old_caches(folder, keep=0)
        run(residual_set(folder, "chunked", model="other"), steps=1)
        seen.append([is_finished(path) for path in folder.iterdir() if path.is_dir()])

    expected, _ = run(residual_set(tmp_path / "elsewhere", storage), steps=5)
    assert run(residuals, steps=5, on_step=on_step)[0].losses == expected.losses
    assert seen == [[True]] * 5
    remove_old_caches(folder, keep=0)
    assert list(folder.iterdir()) == []


def test_a_cache_that_is_written_is_not_removed(tmp_path):
    residuals, other = residual_set(tmp_path, chunk_size=1), residual_set(tmp_path, model="other")

    def progress(phase, done, total):
        if done == total:
            remove_old_caches(tmp_path, keep=0)
            write_cache(other, PlainDit(), quiet)

    write_cache(residuals, PlainDit(), progress)
    assert is_finished(residuals.folder)


def test_another_process_that_computes_the_same_is_waited_for_and_its_cache_used(tmp_path, impatient):
    residuals, calls = residual_set(tmp_path), []
    write_cache(residuals, PlainDit(), quiet)
    finished = residuals.folder / MANIFEST
    finished.rename(tmp_path / "kept")
    held = locks.try_lock(residuals.folder)

    def progress(phase, done, total):
        calls.append((phase, done, total))
        if len(calls) == 4:
            (tmp_path / "kept").rename(finished)
            held.release()

    assert not write_cache(residuals, PlainDit(), progress)
    assert calls == [(WAITING, 3, 3)] * 4
    assert torch.equal(stored_latents(residuals, quiet), residuals.latents)


def test_one_that_ended_early_is_continued(tmp_path, impatient):
    residuals, calls = residual_set(tmp_path), []
    with pytest.raises(Stopped):
        write_cache(residuals, PlainDit(), stop_in_chunk(1))
    held = locks.try_lock(residuals.folder)

    def progress(*report):
        calls.append(report)
        held.release()

    assert write_cache(residuals, PlainDit(), progress)
    assert calls[:2] == [(WAITING, 1, 3), ("computing residuals", 1, 10)]


@pytest.mark.parametrize("act", [lambda r, p: write_cache(r, PlainDit(), p), stored_latents], ids=["write", "read"])
def test_whoever_waits_can_be_interrupted(tmp_path, impatient, act):
    residuals = residual_set(tmp_path)

    def progress(*report):
        raise Interrupt

    with locks.try_lock(residuals.folder), pytest.raises(Interrupt):
        act(residuals, progress)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_was_removed_before_it_was_opened_is_computed_once_more(tmp_path):
    residuals = residual_set(tmp_path)
    (stretch,) = source_of(residuals, PlainDit(), quiet).stretches(MicroBatches(steps=3))
    remove_old_caches(tmp_path, keep=0)
    with stretch as opened:
        assert opened.residual(0).front is not None


def test_a_damaged_cache_that_another_process_reads_is_left_to_it(tmp_path):
    residuals = residual_set(tmp_path, chunk_size=100)
    write_cache(residuals, PlainDit(), quiet)
    damage(residuals.folder)
    with (
        locks.try_lock(residuals.folder, shared=True),
        pytest.raises(CacheError, match="Another process still uses them"),
    ):
        run(residuals)
    assert is_finished(residuals.folder)


def test_chunks_of_a_killed_run_are_removed_and_those_of_a_living_one_stay(tmp_path):
    for name in ("a-chunk-00000000", "b-chunk-00000001"):
        finished_cache(tmp_path / name, 10)
    with locks.try_lock(tmp_path / "b-chunk-00000001"):
        run(residual_set(tmp_path, "chunked"), steps=1)
        assert sorted(os.listdir(tmp_path)) == ["b-chunk-00000001", "b-chunk-00000001.lock"]


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next(tmp_path):
    residuals = residual_set(tmp_path)
    with pytest.raises(Stopped):
        write_cache(residuals, PlainDit(), stop_in_chunk(1))
    (residuals.folder / "shard-00001.safetensors.0123abcd.part").write_text("half")
    write_cache(residuals, PlainDit(), quiet)
    assert not list(residuals.folder.glob("*.part"))


# --- continuing an unfinished cache ------------------------------------------------------------------------------


class Stopped(Exception):
    """The user pressed Cancel."""


def stop_in_chunk(number):
    """A progress callback that stops within a chunk of the five-block model."""

    def progress(phase, done, total):
        if phase == "computing residuals" and done == 5 * number + 2:
            raise Stopped

    return progress


def contents(folder):
    """The content of all files by name; the manifest as parsed JSON."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("back_residual", ["constant", "linear"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_unfinished_cache_is_gone_on_with_and_ends_the_same(tmp_path, number, back_residual):
    whole = residual_set(tmp_path / "whole", back_residual=back_residual)
    write_cache(whole, PlainDit(), quiet)
    cut = residual_set(tmp_path / "cut", back_residual=back_residual)
    with pytest.raises(Stopped):
        write_cache(cut, PlainDit(), stop_in_chunk(number))
    assert not is_finished(cut.folder)
    assert len(list(cut.folder.glob("shard-*"))) == number
    calls = []
    write_cache(cut, PlainDit(), lambda *report: calls.append(report))
    assert calls[0][1:] == (1, 5 * (3 - number))
    assert contents(cut.folder) == contents(whole.folder)


def test_it_is_gone_on_with_in_chunks_of_another_size(tmp_path):
    with pytest.raises(Stopped):
        write_cache(residual_set(tmp_path, chunk_size=2), PlainDit(), stop_in_chunk(1))
    residuals = residual_set(tmp_path, chunk_size=3)
    write_cache(residuals, PlainDit(), quiet)
    expected = residual_set(tmp_path / "whole")
    write_cache(expected, PlainDit(), quiet)
    for draw in range(len(PLAN)):
        ours, theirs = (ResidualCache(some.folder, some.identity).read(draw) for some in (residuals, expected))
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])], ids=["cut", "flip"]
)
@pytest.mark.parametrize("name", ["shard-00000.safetensors", "unfinished.json"])
def test_what_is_damaged_of_an_unfinished_cache_is_computed_anew(tmp_path, name, damage, caplog):
    residuals = residual_set(tmp_path)
    with pytest.raises(Stopped):
        write_cache(residuals, PlainDit(), stop_in_chunk(2))
    path = residuals.folder / name
    path.write_bytes(damage(path.read_bytes()))
    calls = []
    write_cache(residuals, PlainDit(), lambda *report: calls.append(report))
    phase, done, total = calls[0]
    assert (done, total < 15) == (1, name.startswith("shard"))
    assert "computing them again" in caplog.text
    ResidualCache(residuals.folder, residuals.identity).verify()


def test_stopping_in_the_first_chunk_leaves_no_folder(tmp_path):
    residuals = residual_set(tmp_path)
    with pytest.raises(Stopped):
        write_cache(residuals, PlainDit(), stop_in_chunk(0))
    assert not residuals.folder.exists()


def test_an_unfinished_cache_counts_as_one_of_the_kept(tmp_path):
    residuals = residual_set(tmp_path)
    with pytest.raises(Stopped):
        write_cache(residuals, PlainDit(), stop_in_chunk(1))
    remove_old_caches(tmp_path, keep=0, exclude=residuals.folder.name)
    assert residuals.folder.exists()
    remove_old_caches(tmp_path, keep=0)
    assert not residuals.folder.exists()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_linear_answer_is_that_of_the_same_draws_wherever_residuals_are_kept(tmp_path, batch_size):
    settings = {"back_residual": "linear", "chunk_size": 4}
    disk, a = run(residual_set(tmp_path / "disk", **settings), steps=3, batch_size=batch_size)
    chunked, b = run(residual_set(tmp_path / "chunked", "chunked", **settings), steps=3, batch_size=batch_size)
    assert chunked.losses == disk.losses
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_disk_that_fails_for_a_while_costs_no_residuals(tmp_path, monkeypatch):
    residuals = residual_set(tmp_path)
    write_cache(residuals, PlainDit(), quiet)
    before = contents(residuals.folder)

    def gone(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("blockskip_pack.blockskip_core.residuals.cache.open_tensors", gone)
        with pytest.raises(StorageError, match=r"cannot be read: .*Input/output error\. Run again"):
            run(residuals, steps=1)
    assert contents(residuals.folder) == before


def test_room_is_asked_for_before_pictures_are_encoded(tmp_path, monkeypatch):
    residuals, dit = residual_set(tmp_path), PlainDit()
    require_room(residuals, dit)
    require_room(dataclasses.replace(residuals, latents=residuals.latents.to("meta")), dit)
    huge = dataclasses.replace(residuals, latents=torch.empty(5, 2**40, 2, 3, device="meta"))
    with pytest.raises(
        InvalidInputError,
        match=r"latents of 5 training examples need .* of host memory, but .* Use fewer training examples",
    ):
        require_room(huge, dit)
    dit.width = 2**40
    with pytest.raises(InvalidInputError, match="on disk"):
        require_room(residuals, dit)
    require_room(residual_set(tmp_path, "on the fly"), dit)


class SmallDisk:
    """A disk of some bytes, of which what is below a folder is used."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.size = folder, 10**9
        monkeypatch.setattr("blockskip_pack.blockskip_core.residuals.cache.DISK_RESERVE_BYTES", 0)
        monkeypatch.setattr("shutil.disk_usage", self.usage)

    @property
    def used(self):
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def usage(self, _path):
        return SimpleNamespace(total=self.size, used=self.used, free=max(0, self.size - self.used))


def test_an_interrupted_cache_needs_room_for_the_rest_only(tmp_path, monkeypatch):
    disk, residuals, dit = SmallDisk(monkeypatch, tmp_path), residual_set(tmp_path, chunk_size=1), PlainDit()

    def interrupting(phase, done, total):
        if done > 0.75 * total:
            raise Interrupt

    with pytest.raises(Interrupt):
        write_cache(residuals, dit, interrupting)
    assert len(stored_draws(residuals.folder, residuals.identity)) >= 3
    each = residual_bytes(dit, residuals, [1]) + residuals.latents[1].nbytes
    disk.size = disk.used + round(2.2 * each)
    require_room(residuals, dit)
    disk.size = disk.used + each // 2
    with pytest.raises(InvalidInputError, match="on disk"):
        require_room(residuals, dit)


def test_old_caches_make_room_only_if_it_is_needed(tmp_path, monkeypatch):
    disk, dit = SmallDisk(monkeypatch, tmp_path), PlainDit()
    made = [residual_set(tmp_path, model=f"m{number}") for number in range(KEPT_CACHES + 1)]
    for number, residuals in enumerate(made[:-1]):
        write_cache(residuals, dit, quiet)
        os.utime(residuals.folder, (number, number))
    require_room(made[-1], dit)
    assert all(residuals.folder.exists() for residuals in made[:-1])
    disk.size = disk.used + 100
    require_room(made[-1], dit)
    assert [residuals.folder.exists() for residuals in made[:-1]] == [False] + [True] * (KEPT_CACHES - 1)
