"""Each process of a machine trains on a GPU of its own; torch's CUDA is a stand-in here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def chosen(core, monkeypatch):
    """(local rank, size, named, GPUs) -> the GPUs that were made current."""
    module = core("hosts.runs.own_gpu")

    def choose(local_rank, size, named=None, gpus=2):
        found = []
        cuda = SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus, set_device=found.append)
        monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda))
        module.take_own_gpu(local_rank, size, named)
        return found

    return choose


def test_processes_take_the_gpus_in_turn(chosen):
    assert [chosen(rank, 4) for rank in range(4)] == [[0], [1], [0], [1]]


def test_one_process_keeps_the_current_device_unless_one_is_named(chosen):
    assert chosen(0, 1) == []
    assert chosen(0, 1, 1) == [1]
    assert chosen(0, 1, "1,0") == [1]  # as ComfyUI does: the first one that is named


def test_named_gpus_are_shared_out(chosen):
    assert [chosen(rank, 2, "3,1", gpus=4) for rank in range(2)] == [[3], [1]]


def test_without_a_gpu_nothing_is_chosen(chosen):
    assert chosen(1, 2, gpus=0) == []


@pytest.mark.parametrize("named", ["2", "-1", "all", "0,"])
def test_a_gpu_that_is_not_there(chosen, named):
    with pytest.raises(ValueError, match="--cuda-device must name GPUs by number"):
        chosen(0, 1, named)


def test_the_host_takes_it_before_it_loads_anything(core, comfyui, monkeypatch):
    from comfy.cli_args import args

    from_file, module, taken = core("hosts.runs.from_file"), core("hosts.runs.own_gpu"), []
    monkeypatch.setattr(args, "cpu", False)
    monkeypatch.setattr(args, "cuda_device", None)
    monkeypatch.setattr(module, "take_own_gpu", lambda *given: taken.append(given))

    def read(_):
        assert taken == [(1, 2, None)]
        raise InterruptedError

    run = SimpleNamespace(material="m", read_material=read)
    places = SimpleNamespace(data=SimpleNamespace(file=lambda name: name))
    with pytest.raises(InterruptedError):
        from_file.prepare(run, places, None, SimpleNamespace(local_rank=1, rank=1, size=2))


def test_torch_says_the_rank_on_the_machine(core, monkeypatch):
    dist, module = torch.distributed, core("training.together")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    assert module.Processes().local_rank == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert module.Processes().local_rank == 5
