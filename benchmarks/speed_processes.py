"""The arms in one and in several processes: the same steps of two micro-batches, shared or not.

The machine's cores are divided among the processes, so on a CPU this compares two ways of using the same cores; on GPUs
each process has its own. This file is also the program that torchrun starts in each process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ACCUMULATION = 2  # micro-batches of a step, so the largest number of processes
PROCESSES = (1, 2)
RATIO = 0.5
HERE = Path(__file__).resolve().parent


def process_name(processes: int, size: int) -> str:
    """Return the name of an arm."""
    return f"{RATIO:.0%} skipped, {size} px, {ACCUMULATION} micro-batches a step, {processes} process{'es' * (processes > 1)}"


def process_steps(lab: Any, count: int, *, size: int, processes: int) -> list[float]:
    """Time steps in processes of their own, and return the seconds per example of each step."""
    from speed_arms import NotHere

    if lab.patcher.load_device.type == "cuda" and torch.cuda.device_count() < processes:
        raise NotHere(f"This needs {processes} GPUs, and there are {torch.cuda.device_count()}.")
    settings = {
        "shape": asdict(lab.shape), "dtype": str(lab.dtype).removeprefix("torch."), "size": size, "draws": lab.draws,
        "rank": lab.rank, "count": count, "threads": max(1, torch.get_num_threads() // processes),
        "comfyui": os.environ.get("COMFYUI_PATH") or str(_comfyui()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(HERE / "speed_processes.py"), json.dumps(settings), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The processes failed: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _comfyui() -> Path:
    import folder_paths

    return Path(folder_paths.__file__).parent


def _work(settings: dict[str, Any], answer: Path) -> None:
    """Train in one of the processes; the first one writes the seconds per example."""
    import host
    from quality_world import use_pack

    use_pack(Path(settings["comfyui"]))
    torch.set_num_threads(settings["threads"])
    host.use_comfyui(Path(settings["comfyui"]))
    from blockskip_pack.blockskip_core.training.together import joined
    from speed_arms import LEARNING_RATE, WARM_UP, our_adapters
    from speed_model import Lab, Shape

    with joined() as together, tempfile.TemporaryDirectory() as folder:
        from blockskip_pack.blockskip_core.training.config import TrainingConfig
        from blockskip_pack.blockskip_core.training.loop import train_lora
        from blockskip_pack.blockskip_core.training.result import TrainingResult

        size = settings["size"]
        lab = Lab(
            Shape(**settings["shape"]), getattr(torch, settings["dtype"]), Path(folder), sizes=(size, size),
            draws=settings["draws"], rank=settings["rank"],
        )  # fmt: skip
        dit, selection, result = lab.hosted(size), lab.selection(RATIO), TrainingResult()
        config = TrainingConfig(
            steps=WARM_UP + settings["count"], learning_rate=LEARNING_RATE, accumulation=ACCUMULATION
        )  # fmt: skip
        train_lora(
            dit, lab.schedule(size), lab.latents(size), selection, lab.in_memory(size, RATIO),
            our_adapters(lab, dit, selection), config, result=result, together=together,
        )  # fmt: skip
        if together.rank == 0:
            answer.write_text(json.dumps([second / ACCUMULATION for second in result.step_seconds[WARM_UP:]]))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("answer", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "demo"))
    _work(options.settings, options.answer)
