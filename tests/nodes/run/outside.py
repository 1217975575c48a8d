"""Runs outside ComfyUI: a model in a real file, a run file written by the node, and the command in processes of its own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "blockskip_core" / "train.py"
SECONDS = 240  # a process that hangs fails its test


def module_of_hosts(name: str) -> ModuleType:
    """A helper of ``tests/hosts``, which imports its neighbours."""
    return importlib.import_module(f"...hosts.{name}", __package__)


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


def model_in_a_checkpoint(folder: Path) -> Any:
    """The MODEL of a file with everything in it, as Load Checkpoint makes it."""
    import comfy.sd
    from safetensors.torch import save_file

    tensors = module_of_hosts("stored_flux").plain_tensors(0)
    path = folder / "tiny.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


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
            str(run), "--comfyui", str(self.comfyui), "--models", str(self.models), *more, "--output", str(self.output),
            "--", "--cpu",
        ]  # fmt: skip

    def command(self, run: Path, *more: str, processes: int = 1) -> list[str]:
        """The whole command, with torchrun for several processes."""
        started = [sys.executable, "-m"]
        if processes > 1:
            started += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        return [*started, "blockskip_core.train", *self.arguments(run, *more)]

    def train(self, run: Path, *more: str, processes: int = 1) -> SimpleNamespace:
        """Run it to its end in a real terminal's way: ``code`` and ``said``."""
        done = subprocess.run(
            self.command(run, *more, processes=processes), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        return SimpleNamespace(code=done.returncode, said=done.stdout)


def newest_lora(output: Path) -> Path:
    """The LoRA's file with the highest number."""
    return sorted(path for path in (output / "loras").glob("*_.safetensors"))[-1]


class CommandServer:
    """Carries out command lines in processes that need not import anything first; see ``command_server``.

    Args:
        comfyui: ComfyUI's folder.
        folder: For logs.
    """

    def __init__(self, comfyui: Path, folder: Path) -> None:
        self._folder, self._meetings = folder, 0
        program = Path(__file__).with_name("command_server.py")
        self._server = subprocess.Popen(
            [sys.executable, str(program), str(comfyui), str(folder)], env=environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End the server and everything that it has started."""
        self._server.stdin.close()
        self._server.wait(timeout=SECONDS)
        self._server.stdout.close()

    def train(
        self, arguments: Sequence[str] | Mapping[int, Sequence[str]], processes: int = 1,
        events: Mapping[int, dict[str, Any]] | None = None,
    ) -> list[SimpleNamespace]:  # fmt: skip
        """Carry out a command line in some processes; return ``code`` and ``said`` of each, by rank.

        Args:
            arguments: What follows the command's name, the same for all processes or by rank.
            processes: How many; more than one are joined as torchrun joins them.
            events: Rank -> a signal that this process gets: its name, and the phase and count at which it comes.
        """
        self._meetings += 1
        port = _free_port()
        logs = [self._folder / f"log-{self._meetings}-{rank}" for rank in range(processes)]
        started = []
        for rank, log in enumerate(logs):
            variables = {} if processes == 1 else _variables(rank, processes, port)
            own = arguments[rank] if isinstance(arguments, Mapping) else arguments
            order = {"arguments": list(own), "log": str(log), "variables": variables, "event": (events or {}).get(rank)}
            started.append(self._ask("start", **order))
        codes = [self._ended(process) for process in started]
        return [SimpleNamespace(code=code, said=log.read_text()) for code, log in zip(codes, logs, strict=True)]

    def _ended(self, process: int) -> int:
        deadline = time.monotonic() + SECONDS
        while not (found := self._ask("wait", process=process))["ended"]:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                pytest.fail("a process of the command hangs")
            time.sleep(0.02)
        return found["code"]

    def _ask(self, do: str, **order: Any) -> Any:
        self._server.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a worker."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
