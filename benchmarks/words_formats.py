"""Words and weight formats: does the loss of the world's model still follow the word?

Part of the benchmark ``words``. The model's file is written anew in each of ComfyUI's formats, by the tests' writer.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality_world import Bench

FORMATS = ("fp32", "bf16", "fp8 scaled", "int8", "int8 convrot", "nvfp4", "convrot w4a4")
PERTURBATION = 0.2


def in_format(bench: Bench, name: str) -> Bench:
    """Return the bench with its model stored in a format.

    On the CPU ComfyUI computes in float32, except where a format rounds a layer's inputs too (int8, w4a4).
    """
    import host
    from blockskip_pack.tests.hosts import stored_flux
    from safetensors.torch import load_file

    tensors = {key: tensor.float() for key, tensor in load_file(host.ASSETS / host.DIT_FILE).items()}
    other = copy.copy(bench)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "world.safetensors"
        stored_flux.write(path, stored_flux.FORMATS[name], tensors)
        other.model = stored_flux.load(path, stored_flux.FORMATS[name])
    return other


@torch.no_grad()
def signal(subject: Any) -> dict[str, float]:
    """Return how well slopes agree, by perturbation; nothing is refused."""
    from blockskip_pack.blockskip_core.zoodip import signal as check
    from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule

    examples = ExampleSchedule(0, len(subject.held_out_scenes), lowest=0.0, highest=1.0).spread(check.PAIRS)
    with subject.losses.loaded(6):
        slopes = check.measured_slopes(
            subject.losses, subject.first, subject.layout.sizes, [PERTURBATION * f for f in check.FACTORS], examples, 0
        )
    return {f"{PERTURBATION * f:g}": v for f, v in zip(check.FACTORS, check.agreements(slopes).tolist(), strict=True)}
