"""Whether a model run a block at a time computes what it computes whole: its blocks exchange nothing but tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.flow_matching import noisy_batch
from ...data.patch_sampling import PatchConfig
from ...data.schedule import Draw, TrainingSchedule
from ...errors import UnsupportedModelError
from ...model import SkippableDit
from ...residuals.precompute import precompute_residuals
from ...selection.selection import BlockSelection

TOLERANCE = 1e-3  # relative difference; equal kernels on equal tokens are equal to the bit
_DRAW = Draw(picture=0, caption=0, sigma=0.5, side=16, top=0, left=0, noise_seed=0)


@torch.inference_mode(False)
@torch.no_grad()
def require_replay(dit: SkippableDit, latent_shape: Sequence[int], title: str) -> None:
    """Run a small latent through the whole model, and then through one block after the other; the outputs must agree.

    No more than one block's weights are on the device, unless the model is there already.

    Args:
        dit: The model, with at least one caption.
        latent_shape: (C, H, W).
        title: Its name in the message.

    Raises:
        UnsupportedModelError: If they differ.
    """
    schedule = TrainingSchedule((_DRAW,), PatchConfig(patch_min=16, patch_max=16), 0, "check")
    latents = torch.randn(1, *latent_shape, generator=torch.Generator().manual_seed(2))
    selection = BlockSelection(front=1, back=0, num_blocks=len(dit.blocks), family=dit.family)
    replayed = precompute_residuals(dit, schedule, latents, selection, [0]).reference.denoised
    noisy, _, sigmas = (x.to(dit.device) for x in noisy_batch(schedule, latents, [0]))
    with dit.running({}) as denoise:
        whole = denoise(noisy, sigmas, [0]).cpu()
    removed = (noisy.cpu() - whole).norm().clamp_min(1e-12)
    difference = ((replayed - whole).norm() / removed).item()
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"{title}: with its blocks replayed the model computes something else than whole (relative difference "
            f"{difference:.1e}), because its blocks exchange more than tokens. Load the model without changes to its blocks."
        )
