"""Several processes compute one cache of residuals: the same draws, bit for bit, whoever computed them."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.errors import StorageError
from blockskip_pack.blockskip_core.residuals import cached_set, chunks
from blockskip_pack.blockskip_core.residuals.cache import CacheIdentity, ResidualCache
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.residuals.housekeeping import part_folder, remove_old_caches
from blockskip_pack.blockskip_core.residuals.residual_set import ResidualSet
from blockskip_pack.blockskip_core.training import shared_residuals
from blockskip_pack.blockskip_core.training.shared_residuals import write_cache_together

from ..plain_dit import PlainDit, latents, schedule, selection
from ..processes import in_processes, needs_fork

pytestmark = needs_fork
DRAWS = 11


def residual_set(folder, back_residual="constant"):
    plan = schedule([0.05 + 0.08 * number for number in range(DRAWS)], [number % 3 for number in range(DRAWS)])
    chosen = selection(1, 2)
    identity = CacheIdentity(
        model="m", schedule=plan.fingerprint, selection=chosen.fingerprint, pictures="p", captions="c",
        dtype="torch.float64", back_residual=back_residual,
    )  # fmt: skip
    return ResidualSet(
        schedule=plan, latents=latents(DRAWS), selection=chosen, captions=[0, 1, 2], identity=identity, storage="disk",
        chunk_size=2, folder=folder / identity.key, family="plain", back_residual=back_residual,
    )  # fmt: skip


def quiet(phase, done, total):
    """Show nothing."""


def together(residuals):
    """What each process does."""
    return lambda processes: write_cache_together(residuals, PlainDit(), quiet, processes)


def content(residuals):
    with closing(ResidualCache(residuals.folder, residuals.identity)) as cache:
        cache.verify()
        reference = cache.first("reference")
        drop = "reference"
        return {draw: cache.read(draw, lambda name: name != drop) for draw in range(len(cache))}, reference


def assert_same(a, b):
    assert a.keys() == b.keys()
    for draw in a:
        assert a[draw].keys() == b[draw].keys()
        assert all(torch.equal(a[draw][name], b[draw][name]) for name in a[draw]), draw


@pytest.fixture
def expected(tmp_path):
    alone = residual_set(tmp_path / "alone")
    write_cache(alone, PlainDit(), quiet)
    return content(alone)


@pytest.mark.parametrize("size", [2, 4])
def test_they_store_what_one_process_stores(tmp_path, expected, size):
    residuals = residual_set(tmp_path / "shared")
    assert [ended.error for ended in in_processes(tmp_path, size, together(residuals))] == [""] * size
    found, reference = content(residuals)
    assert_same(found, expected[0])
    assert reference[0] == expected[1][0]
    assert torch.equal(reference[1], expected[1][1])
    assert sorted(path.name for path in residuals.folder.parent.iterdir()) == [residuals.folder.name]


def test_a_linear_response_is_left_to_one_of_them(tmp_path):
    alone, residuals = (residual_set(tmp_path / name, "linear") for name in ("alone", "shared"))
    write_cache(alone, PlainDit(), quiet)
    assert [ended.error for ended in in_processes(tmp_path, 2, together(residuals))] == ["", ""]
    assert_same(content(residuals)[0], content(alone)[0])


@pytest.mark.parametrize("size", [1, 3])
def test_after_a_kill_others_take_over_what_is_finished(tmp_path, expected, size):
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        def die(phase, done, total):
            if processes.rank == 1 and done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        write_cache_together(residuals, PlainDit(), die, processes)

    first, second = in_processes(tmp_path / "killed", 2, work)
    assert second.signal == signal.SIGKILL
    assert "lost the others" in first.error
    computed = []

    def counted(processes):
        real = chunks.compute_chunk

        def compute_chunk(residuals, dit, draws, *more):
            computed.extend(draws)
            return real(residuals, dit, draws, *more)

        shared_residuals.compute_chunk = cached_set.compute_chunk = compute_chunk
        write_cache_together(residuals, PlainDit(), quiet, processes)
        return computed

    ended = in_processes(tmp_path / "again", size, counted)
    assert [one.error for one in ended] == [""] * size
    again = [draw for one in ended for draw in one.result]
    assert 0 < len(again) < DRAWS - 2
    assert_same(content(residuals)[0], expected[0])


def test_what_one_cannot_do_ends_all_with_one_sentence(tmp_path):
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        def full(*_):
            raise StorageError("The disk is full.")

        if processes.rank == 1:
            shared_residuals.require_disk_space = full
        write_cache_together(residuals, PlainDit(), quiet, processes)

    first, second = in_processes(tmp_path, 2, work)
    assert first.error == second.error
    assert first.error == "TrainingError: Process 1 could not compute its share of the residuals: The disk is full."


def test_a_process_with_another_folder_is_noticed_before_it_computes(tmp_path):
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        shared_residuals.SECONDS_TO_APPEAR = 0.0
        own = residuals if processes.rank == 0 else replace(residuals, folder=tmp_path / "elsewhere" / "x")
        write_cache_together(own, PlainDit(), quiet, processes)

    first, _second = in_processes(tmp_path, 2, work)
    assert "Process 1 could not compute its share of the residuals: It does not see the folder" in first.error


def manifest_names(residuals):
    return {path.name for path in residuals.folder.iterdir()} & {"manifest.json", "unfinished.json"}


def test_what_cannot_be_read_is_neither_declared_finished_nor_thrown_away(tmp_path, expected):
    """A shard of another machine is not there yet when process 0 puts the parts together."""
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        shared_residuals.SECONDS_TO_APPEAR = 0.0
        real = shared_residuals._put_together

        def too_early(residuals, writer):
            part = part_folder(residuals.folder, 1)
            shard = min(part.glob("shard-*"))
            shard.rename(tmp_path / "late")
            problem = real(residuals, writer)
            (tmp_path / "late").rename(shard)
            return problem

        shared_residuals._put_together = too_early
        write_cache_together(residuals, PlainDit(), quiet, processes)

    for ended in in_processes(tmp_path / "early", 2, work):
        assert ended.error.startswith("TrainingError: 2 of 11 residuals are missing in ")
    assert manifest_names(residuals) == {"unfinished.json"}
    computed = []
    write_cache(residuals, PlainDit(), lambda *_: computed.append(1))  # takes over the shard that came late
    assert computed == []
    assert_same(content(residuals)[0], expected[0])
    assert sorted(path.name for path in residuals.folder.parent.iterdir()) == [residuals.folder.name]


def test_what_appears_late_is_waited_for(tmp_path, expected):
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        real, seen = shared_residuals.adopt_parts, []

        def late(writer, folder):
            seen.append(folder)
            if len(seen) > 1:
                real(writer, folder)

        shared_residuals.adopt_parts = late
        write_cache_together(residuals, PlainDit(), quiet, processes)

    assert [ended.error for ended in in_processes(tmp_path / "late", 2, work)] == ["", ""]
    assert_same(content(residuals)[0], expected[0])


def test_a_part_that_another_holds_is_missing(tmp_path):
    residuals = residual_set(tmp_path / "shared")

    def work(processes):
        shared_residuals.SECONDS_TO_APPEAR = 0.0
        real = shared_residuals._put_together

        def held(residuals, writer):
            with shared_residuals.lock(part_folder(residuals.folder, 1), lambda: None):
                return real(residuals, writer)

        shared_residuals._put_together = held
        write_cache_together(residuals, PlainDit(), quiet, processes)

    for ended in in_processes(tmp_path / "held", 2, work):
        assert "5 of 11 residuals are missing in " in ended.error
    assert manifest_names(residuals) == {"unfinished.json"}


def test_machines_that_see_different_manifests_share_out_what_process_0_sees(tmp_path, expected):
    residuals = residual_set(tmp_path / "shared")
    writer = cached_set.resumed_writer(residuals)
    writer.write(chunks.records_of(residuals, chunks.compute_chunk(residuals, PlainDit(), [0, 1], quiet, None), None))

    def work(processes):
        computed = []
        real = shared_residuals.compute_chunk

        def compute_chunk(residuals, dit, draws, *more):
            computed.extend(draws)
            return real(residuals, dit, draws, *more)

        shared_residuals.compute_chunk = compute_chunk
        if processes.rank == 1:
            shared_residuals.missing_draws = lambda *_: pytest.fail("process 0 alone decides")
        write_cache_together(residuals, PlainDit(), quiet, processes)
        return computed

    ended = in_processes(tmp_path / "seen", 2, work)
    assert [one.error for one in ended] == ["", ""]
    assert sorted(draw for one in ended for draw in one.result) == list(range(2, DRAWS))
    assert_same(content(residuals)[0], expected[0])


def test_parts_are_removed_with_their_cache_and_do_not_count_as_caches(tmp_path):
    residuals = residual_set(tmp_path)
    write_cache(residuals, PlainDit(), quiet)
    for whole in ("old", residuals.folder.name):
        part = part_folder(tmp_path / whole, 1)
        part.mkdir()
        (part / "unfinished.json").touch()
    remove_old_caches(tmp_path, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {residuals.folder.name, f"{residuals.folder.name}-part-1"}
