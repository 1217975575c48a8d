"""DiT-BlockSkip: LoRA training of diffusion transformers with most of the model left out.

Everything except ``hosts`` runs on plain torch. A complete training on your own model:

    import torch
    import blockskip_core as blockskip
    from blockskip_core.examples.small_dit import SmallDit, TextThenImage, clean_estimate

    model = SmallDit()  # in place of yours; its weights are never changed
    captions = [torch.randn(1, 6, 24) for _ in range(2)]  # embedded texts, one per picture
    dit = blockskip.TorchDit(
        model, blocks={"blocks": TextThenImage()}, stem=["image_in", "text_in", "time_in"], head=["out"],
        width=model.width, denoise=clean_estimate, captions=captions,
    )
    pictures = [torch.rand(64, 48, 3) for _ in captions]
    schedule = blockskip.draw_schedule(
        [(64, 48)] * 2, num_captions=2, num_draws=8, seed=0,
        patches=blockskip.PatchConfig(patch_min=16, patch_max=48), sample_sigmas=blockskip.sigma_sampler("uniform"),
    )
    examples = blockskip.Examples.encoded(pictures, schedule, encode=lambda crop: crop.movedim(-1, 0))  # or a VAE

    selection = blockskip.select(dit, skip_ratio=0.5)  # which blocks are left out of the training
    lora = blockskip.train(dit, examples, selection, blockskip.TrainingConfig(steps=8))
    lora.save("lora.safetensors")

    noisy, sigmas = torch.randn(1, 3, 16, 16), torch.tensor([0.9])
    with blockskip.apply(dit, lora) as denoise:
        estimate = denoise(noisy, sigmas, [0])

To train a model in host memory on a GPU, use ``TorchDit(..., device=torch.device("cuda"))``: skipped blocks are never
moved there. A model that a host manages (quantised, streamed) needs its own :class:`SkippableDit`; ComfyUI's is in
``hosts.models.hosted_dit``.
"""

from .adapters.lora import LoraAdapters, LoraSettings
from .api import Examples, Lora, MemoryResiduals, apply, precompute, select, train
from .data.patch_sampling import PatchConfig
from .data.schedule import TrainingSchedule, draw_schedule
from .data.timesteps import sigma_sampler
from .errors import BlockSkipError
from .model import BlockInfo, BlockIO, Denoiser, SkippableDit, TokenStreams, WrappedDit
from .residuals.source import ResidualSource
from .selection.selection import BlockSelection
from .torch_dit import TorchDit
from .training.checkpoints import Checkpoints, RunIdentity
from .training.config import TrainingConfig
from .training.observer import OnStep, TrainingObserver
from .training.result import StepReport, TrainingResult
from .version import VERSION

__all__ = [
    "BlockIO",
    "BlockInfo",
    "BlockSelection",
    "BlockSkipError",
    "Checkpoints",
    "Denoiser",
    "Examples",
    "Lora",
    "LoraAdapters",
    "LoraSettings",
    "MemoryResiduals",
    "PatchConfig",
    "OnStep",
    "ResidualSource",
    "RunIdentity",
    "SkippableDit",
    "StepReport",
    "TokenStreams",
    "TorchDit",
    "TrainingConfig",
    "TrainingObserver",
    "TrainingResult",
    "TrainingSchedule",
    "VERSION",
    "WrappedDit",
    "apply",
    "draw_schedule",
    "precompute",
    "select",
    "sigma_sampler",
    "train",
]
