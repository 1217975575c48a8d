"""Runs outside ComfyUI: a model in a real file, a run file written by the node, and the command in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # a process that hangs fails its test


def module_of_hosts(name: str) -> ModuleType:
    """A helper of ``tests/hosts``, which imports its neighbours."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.hosts.{name}")


class WideVae:
    """A VAE of 8 pixels per cell and 16 channels."""

    def __init__(self) -> None:
        self.first_stage_model = torch.nn.Linear(3, 16, bias=False)
        torch.nn.init.orthogonal_(self.first_stage_model.weight, generator=torch.Generator().manual_seed(7))

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.einsum("oc,bchw->bohw", self.first_stage_model.weight.detach(), cells)


def model_in_a_file(folder: Path, dtype: torch.dtype, seed: int = 0) -> Any:
    """A MODEL that ComfyUI's loader made of ``folder``/tiny.safetensors."""
    stored = module_of_hosts("stored_flux")
    path = folder / "tiny.safetensors"
    stored.write(path, stored.StoredAs(dtype=dtype), stored.plain_tensors(seed))
    return stored.load(path, stored.StoredAs(dtype=dtype))


def environment() -> dict[str, str]:
    """This process's variables, for processes that use one core each and see no pack by accident."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Outside:
    """The command, for a run file.

    Attributes:
        comfyui, models, output: The folders to name.
    """

    comfyui: Path
    models: Path
    output: Path

    def arguments(self, run: Path, *more: str) -> list[str]:
        """What follows the command's name."""
        return [
            str(run), "--comfyui", str(self.comfyui), "--models", str(self.models), "--output", str(self.output), *more,
            "--", "--cpu",
        ]  # fmt: skip

    def command(self, run: Path, *more: str, processes: int = 1) -> list[str]:
        """The whole command, with torchrun for several processes."""
        started = [sys.executable, "-m"]
        if processes > 1:
            started += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        return [*started, "blockskip_core.train", *self.arguments(run, *more)]

    def start(self, run: Path, *more: str, processes: int = 1) -> subprocess.Popen[str]:
        """Start it and do not wait."""
        return subprocess.Popen(
            self.command(run, *more, processes=processes), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def train(self, run: Path, *more: str, processes: int = 1) -> SimpleNamespace:
        """Run it to its end: ``code`` and ``said``."""
        process = self.start(run, *more, processes=processes)
        try:
            said, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return SimpleNamespace(code=process.returncode, said=said)


def newest_lora(output: Path, loras: Sequence[str] = ()) -> Path:
    """The LoRA's file with the highest number."""
    return sorted(path for path in (output / "loras").glob("*_.safetensors"))[-1]
