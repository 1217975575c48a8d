"""The pack's nodes one after another on a family's tiny model, called like by ComfyUI's executor, in inference mode."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ..hosts.tiny_families import TinyFamily
from ..nodes.conftest import PATCHES, TRAINING
from ..nodes.test_families import FamilyVae

DRAWS = {
    **PATCHES, "draws": 4, "patch_min": 32, "patch_max": 64, "chunk_size": 3, "storage": "disk",
    "back_residual": "constant", "residual_format": "exact",
}  # fmt: skip
SAMPLES = {
    "at_start": True, "width": 64, "height": 32, "sampler_steps": 2, "cfg": 1.0, "scheduler": "simple", "seed": 1,
}  # fmt: skip
SKIPPING = {"method": "manual", "skip_ratio": 0.5, "front": 1, "back": 1}


class PictureVae(FamilyVae):
    """Shows a latent's first three channels."""

    def decode(self, latent: Tensor) -> Tensor:
        cells = latent[:, :3, 0] if self._frames else latent[:, :3]
        pixels = torch.nn.functional.interpolate(cells, scale_factor=self.spacial_compression_encode())
        return pixels.movedim(1, -1).sigmoid()


@dataclass
class Outcome:
    """The results of a training run.

    Attributes:
        losses: One per micro-batch.
        gradients: One per optimiser step: those of all adapters one after another, on the CPU.
        lora: The trained tensors, on whichever device they are.
        said: The figures that the node shows.
    """

    losses: list[float]
    gradients: list[Tensor]
    lora: dict[str, Tensor]
    said: dict[str, Any]

    def differences(self, other: Outcome) -> list[float]:
        """Return the relative difference of each step's gradient from that of another run."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return [((mine - its).norm() / its.norm()).item() for mine, its in pairs]

    def is_bit_equal(self, other: Outcome) -> bool:
        """Return whether all numbers are equal."""
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
        folder: ComfyUI's output folder.
        held: All outputs of the nodes, because ComfyUI keeps them in its cache.
    """

    nodes: ModuleType
    run_node: Callable[..., Any]
    pictures: list[Tensor]
    folder: Path
    held: list[Any] = field(default_factory=list)

    def train(self, family: TinyFamily, model: Any, *, sample_every: int = 0, **settings: Any) -> Outcome:
        """Select, precompute and train, without files of an earlier run.

        Args:
            family: Whose model it is.
            model: The MODEL.
            sample_every: Steps between pictures; 0 for none.
            settings: Widgets of Precompute Residuals and of the trainer that differ from the defaults here.
        """
        self.start_over()
        residuals = self.precompute(
            family, model, **{name: settings.pop(name) for name in (DRAWS.keys() | {"tail"}) & settings.keys()}
        )
        if sample_every:
            vae, positive = PictureVae(model.model, family.frames), family.captions((5,))[0]
            settings["samples"] = self.call(
                "SampleWhileTraining", positive=positive, vae=vae, every=sample_every, **SAMPLES
            )[0]
        return self.train_on(model, residuals, **settings)

    def precompute(self, family: TinyFamily, model: Any, *, tail: int = 0, **settings: Any) -> Any:
        """Select, keeping ``tail`` blocks after the skipped ones, and precompute; return the residuals."""
        positive, vae = family.captions((5,))[0], FamilyVae(model.model, family.frames)
        selection = self.call("SelectBlocks", model=model, positive=positive, tail=tail, **SKIPPING)[0]
        return self.call(
            "PrecomputeResiduals", model=model, vae=vae, images=self.pictures, positive=positive, selection=selection,
            **{**DRAWS, **settings},
        )[0]  # fmt: skip

    def train_on(self, model: Any, residuals: Any, **settings: Any) -> Outcome:
        """Train."""
        with _gradients() as gradients:
            trained = self.call("TrainLora", model=model, residuals=residuals, **{**TRAINING, **settings})
        return Outcome(list(trained[1]["loss"]), gradients, trained[0], trained.ui["blockskip"][0])

    def start_over(self) -> None:
        """Delete the computed files, because they are found by their content on whichever device they were computed."""
        shutil.rmtree(self.folder / "blockskip", ignore_errors=True)

    def apply(self, model: Any, outcome: Outcome) -> Any:
        """Return the MODEL with the LoRA."""
        return self.call("ApplyLora", model=model, lora=outcome.lora, strength_model=1.0)[0]

    def call(self, node: str, **inputs: Any) -> Any:
        """Call a node of the pack."""
        import comfy.memory_management
        import comfy.model_management

        self.held.append(self.run_node(getattr(self.nodes, node), **inputs))
        if comfy.memory_management.aimdo_enabled:
            if node in ("PrecomputeResiduals", "TrainLora"):  # others run the host's own loader and sampler
                assert not comfy.model_management.STREAM_AIMDO_CAST_BUFFERS
            comfy.model_management.reset_cast_buffers()  # as the executor does after each node
        return self.held[-1]


@contextmanager
def _gradients() -> Iterator[list[Tensor]]:
    """Collect the gradients before the training clips them."""
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


@contextmanager
def leaving_nothing(card: Any, model: Any) -> Iterator[None]:
    """Check that a MODEL is unchanged afterwards and the card as empty as before, apart from what ComfyUI keeps."""
    import comfy.model_management as management

    def taken() -> int:
        return card.memory.settled() - sum(tensor.nbytes for tensor in _kept_by_host(model))

    before, taken_before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}, taken()
    yield
    assert taken() == taken_before
    after, kept = model.model.state_dict(), {tensor.untyped_storage().data_ptr() for tensor in _kept_by_host(model)}
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor.cpu(), before[name].cpu()) for name, tensor in after.items())
    assert all(tensor.is_cpu or tensor.untyped_storage().data_ptr() in kept for tensor in after.values())
    with torch.inference_mode():  # one that was moved outside it has no views any more, and ComfyUI needs them
        assert all(tensor.detach().shape == before[name].shape for name, tensor in model.model.state_dict().items())
    assert not model.object_patches_backup
    assert not management.in_training


def _kept_by_host(model: Any) -> list[Tensor]:
    """Return what ComfyUI leaves on a card: buffers that layers are copied into, and a table of the 4-bit kernels.

    For a paged MODEL also parameters of modules that contain other modules: loading moves them permanently.
    """
    import comfy.model_management as management
    from comfy_kitchen.backends.eager.quantization import E2M1_LUT_CACHE

    moved = [
        parameter
        for module in model.model.modules()
        for parameter in module._parameters.values()
        if model.is_dynamic() and parameter is not None and any(True for c in module.children() for _ in c.parameters())
    ]
    kept = (*management.STREAM_CAST_BUFFERS.values(), *E2M1_LUT_CACHE.values(), *moved)
    return [tensor for tensor in kept if tensor.is_cuda]
