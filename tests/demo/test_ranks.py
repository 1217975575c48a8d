"""Several processes train one model: gradients are averaged, and every process has pictures of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"
PROGRAM = """
import sys
import torch
import world_ranks
model = torch.nn.Linear(3, 1, bias=False)
torch.nn.init.ones_(model.weight)
shared = world_ranks.sharing_gradients(model)
number, count = world_ranks.rank(), world_ranks.ranks()
shared(torch.full((2, 3), 1.0 + number)).sum().backward()
torch.save((number, count, model.weight.grad), f"{sys.argv[1]}/{number}.pt")
"""


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    import torch

    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, str(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(DEMO), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    for number in (0, 1):
        assert torch.load(tmp_path / f"{number}.pt")[:2] == (number, 2)
        gradient = torch.load(tmp_path / f"{number}.pt")[2]
        assert torch.equal(gradient, torch.full((1, 3), 3.0))  # the mean of 2 and 4


def test_without_torchrun_there_is_one_process_and_the_model_is_not_wrapped(
    demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    ranks = demo("world_ranks")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(1, 1)
    assert (ranks.rank(), ranks.ranks()) == (0, 1)
    assert ranks.sharing_gradients(model) is model
    assert ranks.seed_for(3, 7) == (3 << 32) + 7


def test_every_process_has_random_numbers_and_pictures_of_its_own(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    ranks, data = demo("world_ranks"), demo("world_data")
    bucket = data.Bucket((64, 64), 2, 1.0, 8, 4)
    used: list[int] = []

    def part(self, bucket, number):
        used.append(number)
        return {"ids": torch.zeros(bucket.views, 4, 16)}

    monkeypatch.setattr(data.Latents, "part", part)
    monkeypatch.setenv("WORLD_SIZE", "2")
    seeds = set()
    for number in (0, 1):
        monkeypatch.setenv("RANK", str(number))
        held = data.Latents(tmp_path, 0, torch.nn.Identity(), lambda text: []).available(bucket, 100 * data.GROWTH)
        assert len(held["ids"]) == 2 * bucket.views
        seeds.add(ranks.seed_for(0, 5))
    assert used == [0, 2, 1, 3]
    assert len(seeds) == 2
