"""Wall-clock time of the stages and of plain sampling, on a FLUX.1 with random weights, which do not affect the time.

On a GPU: ``python dev.py benchmark ralu -- --parts seconds --shape flux-dev --side 1024 --plain-steps 50``. On a CPU
use a smaller shape and a few plain steps, from which the time of 50 is calculated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from blockskip_pack.blockskip_core.hosts.sampling.early_regions import RegionChoice
from blockskip_pack.blockskip_core.hosts.sampling.region_adaptive import RegionAdaptiveSampler
from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS
from speed_model import SHAPES, build_flux

FULL_STEPS = 50
TIMED = (("FLUX 4x", 0.3), ("FLUX 5x", 0.2), ("FLUX 7x", 0.2))


def rows(shape: str, side: int, plain_steps: int, repeats: int) -> list[dict[str, Any]]:
    """Return the seconds of plain sampling and of each preset, as the median of some repeats after a warm-up.

    Args:
        shape: A key of ``speed_model.SHAPES``.
        side: Side of the picture in pixels.
        plain_steps: Number of plain steps that are really run.
        repeats: Number of repeats of everything.
    """
    size, device = SHAPES[shape], comfy.model_management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build_flux(size, dtype)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, size.text_tokens, size.context, generator=generator)
    prompt = [[text, {"pooled_output": torch.randn(1, size.pooled, generator=generator), "guidance": 3.5}]]
    empty = torch.zeros(1, 16, side // 8, side // 8)

    def plain(steps: int) -> Any:
        noise = comfy.sample.prepare_noise(empty, 0)
        return comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", prompt, prompt, empty, seed=0, disable_pbar=True
        )

    def staged(preset: str, ratio: float) -> Any:
        choice = RegionChoice(method="latent gradient", ratio=ratio)
        return RegionAdaptiveSampler(model, PRESETS[preset], choice).sample(prompt, prompt, 1.0, empty, 0)

    about = {"shape": shape, "side": side, "device": _name(device), "dtype": str(dtype).removeprefix("torch.")}
    with torch.inference_mode():
        plain(1)
        measured = _median(lambda: plain(plain_steps), repeats, device)
        full = measured * FULL_STEPS / plain_steps
        found = [{**about, "name": f"plain, {FULL_STEPS} steps", "run": plain_steps, "seconds": full, "ratio": 1.0}]
        for preset, ratio in TIMED:
            seconds = _median(lambda preset=preset, ratio=ratio: staged(preset, ratio), repeats, device)
            run = sum(PRESETS[preset].steps)
            found.append({**about, "name": preset, "run": run, "seconds": seconds, "ratio": full / seconds})
    return found


def _median(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return wall-clock seconds, or on a CPU, which may be shared, seconds of processor time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(clock() - start)
    return statistics.median(taken)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)"
