"""A MODEL that teaches its own coarse calls: one set of weights, loaded once, as teacher and as student.

The blocks run as in a LoRA training (``blocks.skipping_model`` with nothing skipped): out of place, with activations
recomputed, and with linear layers that save no weights. The teacher is the same model without the adapters' hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.lora import LinearShape, LoraAdapters, LoraSettings
from ...blocks.skipping_model import SkippingModel
from ...blocks.stand_ins import TrainedBlock
from ...ddit.coarse_estimate import CoarseAdapter
from ...devices import same_device
from ...errors import TrainingError
from ...model import Denoiser, WeightPlacement, is_linear
from ...selection.selection import BlockSelection
from ...training.self_check import check_gradients
from .adapted_dit import AdaptedDit
from .coarse_forward import CoarseForward

_LORA, _PATCHES = "lora/", "patches/"


class TrainedParts:
    """Everything that is trained for one patch size.

    Attributes:
        coarse: The patch size, its statistics and its tensors.
        lora: The low-rank adapters of the blocks.

    Args:
        dit: The model.
        coarse: With tensors and statistics.
        settings: Of the LoRA.
        seed: Of its initial values.
    """

    def __init__(self, dit: AdaptedDit, coarse: CoarseAdapter, settings: LoraSettings, seed: int) -> None:
        layers = dit.lora_layers(all_blocks(dit), settings.targets)
        shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
        assert coarse.patches is not None, "there is nothing to train without them"
        self.coarse, self.patches = coarse, coarse.patches
        self.lora = LoraAdapters(shapes, settings, seed=seed)

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained tensors."""
        return [*self.patches.parameters(), *self.lora.parameters()]

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move all tensors, keeping the parameter objects."""
        self.lora.to(device)
        for parameter in self.patches.parameters():
            parameter.data = parameter.data.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all trained tensors, on the CPU."""
        own = {_PATCHES + name: x.detach().to("cpu", copy=True) for name, x in self.patches.named_parameters()}
        return own | {_LORA + name: tensor for name, tensor in self.lora.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of :meth:`state_dict`, bit for bit."""
        for name, parameter in self.patches.named_parameters():
            parameter.copy_(state[_PATCHES + name])
        self.lora.load_state_dict({name.removeprefix(_LORA): x for name, x in state.items() if name.startswith(_LORA)})

    def low_rank(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (A, B with its scale folded in) of every layer, as copies on the CPU."""
        names, lora = self.lora.names, self.lora
        pairs = {name: (lora.down(name), lora.up(name) * lora.scale) for name in names}
        return {
            name: (down.detach().to("cpu", copy=True), up.detach().to("cpu", copy=True))
            for name, (down, up) in pairs.items()
        }


def all_blocks(dit: AdaptedDit) -> BlockSelection:
    """Return the selection that skips nothing."""
    return BlockSelection(front=0, back=0, num_blocks=len(dit.blocks), family=dit.family)


class CoarseDistillation:
    """A running model with the parts that are trained; a ``distillation.distilled.Distilled``."""

    def __init__(
        self,
        dit: AdaptedDit,
        denoise: Denoiser,
        coarse: CoarseForward,
        parts: TrainedParts,
        linears: Mapping[str, nn.Module],
    ) -> None:
        self._dit, self._denoise, self._coarse, self._parts, self._linears = dit, denoise, coarse, parts, linears
        self._options = dit.patcher.model_options["transformer_options"]
        _require_on(dit.device, parts.patches)
        self._adapter = parts.coarse.with_statistics_on(dit.device)  # no copies of what is trained

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._dit.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return self._dit.dtype

    def teacher(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with the model's own patches."""
        return self._denoise(noisy, sigmas, captions)

    def student(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with coarse patches; the LoRA acts within :meth:`attached`."""
        return self._called(noisy, sigmas, captions, self._adapter)

    def untrained(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with coarse patches and nothing trained or measured."""
        with torch.no_grad():
            return self._called(noisy, sigmas, captions, CoarseAdapter(self._parts.coarse.resizing))

    def _called(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int], adapter: CoarseAdapter) -> Tensor:
        denoise = partial(_for_captions, self._denoise, captions)
        return self._coarse(denoise, noisy, sigmas, adapter, {}, self._options)

    def attached(self) -> AbstractContextManager[object]:
        """Put the LoRA's hooks on the blocks; backward needs them too, because blocks run again in it."""
        return self._parts.lora.attached(self._linears, self._dit.weight_for_backward)

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens of a caption."""
        return self._dit.text_length(caption)

    def check_gradients(self) -> None:
        """Require a gradient in every tensor of the patches, and in the LoRA of every block.

        Raises:
            TrainingError: If one has none.
        """
        without = [name for name, tensor in self._parts.patches.named_parameters() if tensor.grad is None]
        if without:
            raise TrainingError(
                f"These tensors of the patch adapter got no gradient in the first step: {', '.join(without)}. This is a "
                f"bug in coarse steps of the {self._dit.family} family; please report it."
            )
        check_gradients(self._dit, all_blocks(self._dit), self._parts.lora)

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained tensors."""
        return self._parts.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all trained tensors, on the CPU."""
        return self._parts.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of :meth:`state_dict`, bit for bit."""
        self._parts.load_state_dict(state)


def _require_on(device: torch.device, patches: nn.Module) -> None:
    """Check that trained tensors are on a device.

    Raises:
        TrainingError: If one is not.
    """
    for name, tensor in patches.named_parameters():
        if not same_device(tensor.device, device):
            raise TrainingError(
                f"The patch adapter's {name} is on {tensor.device} and the model on {device}. This is a bug; please report it."
            )


def _for_captions(denoise: Denoiser, captions: Sequence[int], noisy: Tensor, sigmas: Tensor) -> Tensor:
    return denoise(noisy, sigmas, captions)


@contextmanager
def distilling(
    dit: AdaptedDit,
    parts: TrainedParts,
    *,
    checkpointing: bool = True,
    weights: WeightPlacement = "as fits",
    activation_bytes: int = 0,
) -> Iterator[CoarseDistillation]:
    """Load the model as teacher and student; unload it and restore everything afterwards.

    Args:
        dit: The model; its patcher must be the caller's own clone.
        parts: What is trained; on the CPU again afterwards.
        checkpointing: Recompute each block's activations in backward.
        weights: Where the host keeps the weights.
        activation_bytes: Memory that the host should keep free beside them: for activations, what is trained and its optimiser.
    """
    before = CoarseForward(dit.patcher)
    before.prepare(dit.patcher)
    model = SkippingModel(dit, all_blocks(dit), checkpointing, folded=False)
    between = {name: TrainedBlock(dit.module(name), checkpointed=False) for name in before.layers.between}
    linears = {**model.linears(), **_linears_of(between)}
    try:
        modules = {**model.modules, **between}
        with (
            torch.inference_mode(False),
            dit.running(modules, activation_bytes=activation_bytes, weights=weights) as denoise,
        ):
            parts.to(dit.device)
            yield CoarseDistillation(dit, denoise, before.renewed(), parts, linears)
    finally:
        parts.to(torch.device("cpu"))


def _linears_of(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    return {
        f"{stem}.{path}": layer
        for stem, module in modules.items()
        for path, layer in module.named_modules()
        if is_linear(layer)
    }
