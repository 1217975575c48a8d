"""The arithmetic of scaling counts what two and four real processes do, and the documents show what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from blockskip_pack.blockskip_core.residuals import cache
from blockskip_pack.blockskip_core.residuals.cache import CacheIdentity, CacheWriter, ResidualCache
from blockskip_pack.blockskip_core.residuals.residual_set import ResidualSet
from blockskip_pack.blockskip_core.residuals.sources import DiskSource
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.result import TrainingResult
from blockskip_pack.blockskip_core.training.shared_residuals import write_cache_together

from ..core.plain_dit import LATENT_SHAPE, PlainDit, latents, lora_for, schedule, selection
from ..core.processes import in_processes, needs_fork

ROOT = Path(__file__).resolve().parents[2]
DRAWS, STEPS, ACCUMULATION, BATCH = 10, 3, 4, 2


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


def residual_set(folder):
    plan, chosen = schedule([0.05 + 0.09 * number for number in range(DRAWS)], [0, 1] * (DRAWS // 2)), selection(1, 1)
    identity = CacheIdentity(
        model="m", schedule=plan.fingerprint, selection=chosen.fingerprint, pictures="p", captions="c",
        dtype="torch.float64",
    )  # fmt: skip
    return ResidualSet(
        schedule=plan, latents=latents(DRAWS), selection=chosen, captions=[0, 1], identity=identity, storage="disk",
        chunk_size=2, folder=folder / identity.key, family="plain",
    )  # fmt: skip


def watched(residuals):
    """Train in one of several processes, and return what it did."""

    def work(together):
        done = {"examples": 0, "computed": 0, "written": 0, "read": 0}
        read, write, look = ResidualCache._read_tensor, CacheWriter.write, cache.read_checked

        def reading(tensor, key):
            done["read"] += 0 if key.endswith("reference") else tensor.nbytes
            return tensor

        def writing(self, records):
            done["computed"] += len(records)
            done["written"] += sum(
                x.nbytes for one in records.values() for name, x in one.items() if name != "reference"
            )
            write(self, records)

        ResidualCache._read_tensor = lambda self, key: reading(read(self, key), key)
        cache.read_checked = lambda path, key, entry: reading(look(path, key, entry), key)
        CacheWriter.write = writing
        dit = PlainDit()
        write_cache_together(residuals, dit, lambda *_: None, together)
        adapters, config = lora_for(dit, residuals.selection), TrainingConfig(
            steps=STEPS, batch_size=BATCH, accumulation=ACCUMULATION
        )  # fmt: skip
        result = TrainingResult()
        train_lora(
            dit, residuals.schedule, residuals.latents, residuals.selection, _Counting(residuals, dit, done), adapters,
            config, result=result, together=together,
        )  # fmt: skip
        numbers = sum(parameter.numel() for parameter in adapters.parameters())
        return {**done, "steps": result.steps, "reduced": together.reduced_bytes}, numbers, len(adapters.parameters())

    return work


class _Counting(DiskSource):
    """Counts the examples that a process goes through."""

    def __init__(self, residuals, dit, done):
        super().__init__(residuals, dit, lambda *_: None)
        self._done, self._count = done, len(residuals.schedule)

    def stretches(self, run, start=0):
        self._done["examples"] += sum(len(run.draws_of(number, self._count)) for number in range(start, len(run)))
        return super().stretches(run, start)


@needs_fork
@pytest.mark.parametrize("size", [2, 4])
def test_it_counts_what_processes_do(tmp_path, scaling, monkeypatch, size):
    monkeypatch.setattr(scaling, "GRADIENT_BYTES", 8)  # this model trains in float64
    residuals = residual_set(tmp_path)
    tokens_front, tokens_back, width = 6 + 5, 6, 8
    latent = LATENT_SHAPE[0] * LATENT_SHAPE[1] * LATENT_SHAPE[2] * 8
    for rank, ended in enumerate(in_processes(tmp_path / "meet", size, watched(residuals))):
        assert ended.error == ""
        done, numbers, tensors = ended.result
        load = scaling.Workload(
            name="", draws=DRAWS, steps=STEPS, accumulation=ACCUMULATION, batch_size=BATCH, lora_numbers=numbers,
            lora_tensors=tensors, residual_bytes=(tokens_front + tokens_back) * width * 8, latent_bytes=latent,
            all_weights=0, kept_weights=0, tokens=0,
        )  # fmt: skip
        count = scaling.counted(load, size, rank)
        assert done == {
            "examples": count.examples, "computed": count.computed, "written": count.written_bytes,
            "read": count.read_bytes, "steps": count.steps, "reduced": count.reduced_bytes,
        }  # fmt: skip


def test_one_process_sums_nothing_and_all_do_the_same_work(scaling):
    load = scaling.FLUX_1
    alone = scaling.counted(load, 1)
    assert (alone.reduced_bytes, alone.sent_bytes) == (0, 0.0)
    assert alone.examples == load.steps * load.accumulation
    for size in scaling.COUNTS:
        each = [scaling.counted(load, size, rank) for rank in range(size)]
        assert sum(one.examples for one in each) == alone.examples
        assert sum(one.computed for one in each) == load.draws
        assert sum(one.written_bytes for one in each) == alone.written_bytes
    with pytest.raises(ValueError, match="accumulation 8 is no multiple of 3 processes"):
        scaling.counted(load, 3)


def test_more_gpus_are_faster_and_dearer(scaling):
    machine = scaling.Machine()
    totals = [scaling.estimated(scaling.FLUX_1, machine, size).total for size in scaling.COUNTS]
    assert totals == sorted(totals, reverse=True)
    costs = [total * size for total, size in zip(totals, scaling.COUNTS, strict=True)]
    assert costs == sorted(costs)


def test_the_document_shows_this_table(scaling):
    text = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    assert scaling.table(scaling.Machine()) in text
    assert scaling.table(scaling.Machine()) in (ROOT / "benchmarks" / "results" / "scaling.md").read_text(
        encoding="utf-8"
    )
