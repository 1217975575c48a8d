"""The pack's nodes in a row on a family's tiny model, called as ComfyUI's executor calls them: under inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ..hosts.families import TinyFamily
from ..nodes.conftest import PATCHES, TRAINING
from ..nodes.test_families import FamilyVae

DRAWS = {**PATCHES, "draws": 4, "patch_min": 32, "patch_max": 64}
SKIPPING = {"method": "manual", "skip_ratio": 0.5, "front": 1, "back": 1}


@dataclass
class Outcome:
    """What a training came to.

    Attributes:
        losses: Of each micro-batch.
        gradients: Of each optimiser step: those of all adapters one after another, on the CPU.
        lora: The trained file, on whatever device it is.
        said: The figures that the node shows.
    """

    losses: list[float]
    gradients: list[Tensor]
    lora: dict[str, Tensor]
    said: dict[str, Any]

    def differences(self, other: Outcome) -> list[float]:
        """Return by how much each step's gradient differs from another's, relative to it."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return [((mine - its).norm() / its.norm()).item() for mine, its in pairs]

    def is_bit_equal(self, other: Outcome) -> bool:
        """Tell whether all numbers are the same."""
        return (
            self.losses == other.losses
            and all(map(torch.equal, self.gradients, other.gradients))
            and all(torch.equal(tensor.cpu(), other.lora[name].cpu()) for name, tensor in self.lora.items())
        )


@dataclass
class Runs:
    """Runs the nodes.

    Attributes:
        nodes: The pack's nodes.
        run_node: Calls one.
        pictures: The training pictures.
        folder: Where ComfyUI's output folder is.
        held: All that the nodes gave: ComfyUI keeps it in its cache.
    """

    nodes: ModuleType
    run_node: Callable[..., Any]
    pictures: list[Tensor]
    folder: Path
    held: list[Any] = field(default_factory=list)

    def train(
        self, family: TinyFamily, model: Any, *, storage: str = "disk", draws: dict | None = None, **training: Any
    ) -> Outcome:
        """Select, precompute and train."""
        positive = family.captions((5,))[0]
        selection = self._call("SelectBlocks", model=model, positive=positive, **SKIPPING)[0]
        vae = FamilyVae(model.model.latent_format, family.frames)
        residuals = self._call(
            "PrecomputeResiduals", model=model, vae=vae, images=self.pictures, positive=positive, selection=selection,
            **{**DRAWS, "storage": storage, "chunk_size": 3, **(draws or {})},
        )[0]  # fmt: skip
        with _gradients() as gradients:
            trained = self._call("TrainLora", model=model, residuals=residuals, **{**TRAINING, **training})
        return Outcome(list(trained[1]["loss"]), gradients, trained[0], trained.ui["blockskip"][0])

    def apply(self, model: Any, outcome: Outcome) -> Any:
        """Return the MODEL with the LoRA."""
        return self._call("ApplyLora", model=model, lora=outcome.lora, strength_model=1.0)[0]

    def _call(self, node: str, **inputs: Any) -> Any:
        self.held.append(self.run_node(getattr(self.nodes, node), **inputs))
        return self.held[-1]


@contextmanager
def _gradients() -> Iterator[list[Tensor]]:
    """Collect the gradients that the training clips, as they were before."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def clipping(parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.detach().flatten().float().cpu() for p in parameters if p.grad is not None]))
        return clip(parameters, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
        yield seen


def on_cpu(patcher: Any) -> Any:
    """Return a MODEL with the same weights that runs on the CPU."""
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(patcher.model, load_device=cpu, offload_device=cpu)
