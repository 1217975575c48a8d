"""A smaller FLUX.1 with random weights, really trained on the CPU, by ComfyUI's own node and by this package.

Core's node cannot run without weights. Here it is run unchanged, and counted by the same :class:`Counting`; this
package is counted on the same model both with and without weights, and the two counts must be equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.accounting.phase_counts import (
    PhaseCount,
    adapters_on,
    count_training,
    residual_of_zeros,
    token_shapes,
)
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.blocks.saved_bytes import SavedBytes
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from memory_arms import CELL, CORE, OURS, RANK, TEXT_TOKENS, Arm

WIDTH, HEADS, DOUBLE, SINGLE, CONTEXT, POOLED, CHANNELS = 512, 4, 4, 8, 768, 256, 16
SKIPPED = (4, 2)  # half of twelve blocks, split like the paper's choice for FLUX.1
SIZE = 256
PART = f"for real: a FLUX.1 {WIDTH} wide, {DOUBLE} + {SINGLE} blocks"


class Lab:
    """The model and a caption."""

    @cached_property
    def patcher(self) -> Any:
        """The MODEL, with the factory that ComfyUI's loaders attach and that core's trainer calls for its own copy."""
        patcher = _patcher_of(self._model())
        patcher.cached_patcher_init = (lambda disable_dynamic=False: _patcher_of(self._model(), disable_dynamic), ())
        return patcher

    @torch.inference_mode(False)
    def _model(self) -> Any:
        import comfy.supported_models

        supported = comfy.supported_models.Flux(
            {
                "image_model": "flux", "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2,
                "vec_in_dim": POOLED, "context_in_dim": CONTEXT, "hidden_size": WIDTH, "mlp_ratio": 4.0,
                "num_heads": HEADS, "depth": DOUBLE, "depth_single_blocks": SINGLE, "axes_dim": [16, 56, 56],
                "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
            }
        )  # fmt: skip
        supported.custom_operations = None
        supported.set_inference_dtype(torch.float32, None)
        model = supported.get_model({}, "", device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(1.0 + 0.1 * noise if name.endswith(("norm.scale", "norm.weight")) else noise)
        return model.requires_grad_(False)

    @cached_property
    def caption(self) -> list:
        """A CONDITIONING."""
        return [[torch.zeros(1, TEXT_TOKENS, CONTEXT), {"pooled_output": torch.zeros(1, POOLED), "guidance": 3.5}]]

    @cached_property
    def weights(self) -> int:
        """Bytes of the model's weights."""
        return sum(parameter.nbytes for parameter in self.patcher.model.parameters())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (CHANNELS, SIZE // CELL, SIZE // CELL)

    def core(self, checkpointing: bool, bypass: bool) -> PhaseCount:
        """Run core's node for one and for two steps, as ComfyUI calls it, and count it.

        The model itself is not counted, but its copy is: on a CPU host and device memory are the same, so the weights
            of the
        copy represent those that a GPU would hold.
        """
        one = self._core(1, checkpointing, bypass)[1].operations
        saved, counting = self._core(2, checkpointing, bypass)
        return PhaseCount(
            weights=self.weights, peak=counting.peak(torch.device("cpu")), saved=saved,
            operations=counting.operations - one, host=self.weights,
        )  # fmt: skip

    def _core(self, steps: int, checkpointing: bool, bypass: bool) -> tuple[int, Counting]:
        from comfy_extras.nodes_train import TrainLoraNode

        saved = SavedBytes()
        settings = {
            "batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": RANK,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": checkpointing,
            "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
            "bypass_mode": bypass,
        }  # fmt: skip

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.add(tensor)
            return tensor

        self.patcher  # noqa: B018  build it before counting begins
        with warnings.catch_warnings(), Counting() as counting:
            warnings.simplefilter("ignore")  # autocast warns about float32
            with torch.inference_mode(), _hooks_unless(checkpointing, pack):
                TrainLoraNode.execute(
                    model=[self.patcher], latents=[{"samples": torch.zeros(1, *self.latent_shape)}],
                    positive=[self.caption], **{name: [value] for name, value in settings.items()},
                )  # fmt: skip
        return saved.total // steps, counting

    def ours(self, spans: tuple[int, int], checkpointing: bool, *, weightless: bool) -> PhaseCount:
        """Run two steps of this package's training loop, with or without weights, and count the second."""
        real = HostedDit(self.patcher, [self.caption], self.latent_shape)
        dit = WeightlessDit.of(real) if weightless else real
        selection = BlockSelection(front=spans[0], back=spans[1], num_blocks=len(dit.blocks), family=dit.family)
        adapters = adapters_on(dit, dit.lora_layers(selection, "attention and mlp"), LoraSettings(rank=RANK))
        tokens = token_shapes(dit, self.latent_shape, block=max(0, spans[0] - 1))
        config = TrainingConfig(steps=1, checkpointing=checkpointing)
        residual = residual_of_zeros(tokens, selection)
        count = count_training(dit, self.latent_shape, selection, adapters, config, residual)
        kept = sum(real.block_bytes[index] for index in selection.kept)
        return count.with_weights(kept + self.weights - sum(real.block_bytes))


def _hooks_unless(checkpointing: bool, pack: Callable) -> Any:
    """Return hooks that see what is saved; with checkpoints none, because core's use their own hooks."""
    from contextlib import nullcontext

    return nullcontext() if checkpointing else torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _patcher_of(model: Any, disable_dynamic: bool = False) -> Any:
    import comfy.model_management as management
    import comfy.model_patcher

    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return kind(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def arms_of(lab: Lab) -> list[Arm]:
    """Return all arms with real training."""
    shared = {"part": PART, "size": SIZE, "weights": "float32"}
    arms = [
        Arm(**shared, name=f"{CORE}, {'bypass mode' if bypass else 'weight wrappers'}" + ", checkpoint_depth 1" * on,
            checkpointing=on,
            host_copies=1, count=lambda on=on, bypass=bypass: lab.core(on, bypass))
        for bypass in (False, True) for on in (False, True)
    ]  # fmt: skip
    arms += [
        Arm(**shared, name=f"{OURS}, {'half' if any(spans) else 'nothing'} skipped{how}", checkpointing=on,
            skipped=spans, source="cached",
            count=lambda a=(spans, on), weightless=bool(how): lab.ours(*a, weightless=weightless))
        for spans in ((0, 0), SKIPPED) for on in (False, True) for how in ("", ", counted without weights")
    ]  # fmt: skip
    return arms
