"""Check that a model computes the same when its blocks are replayed, for models that no family file describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...blocks.replay import Replay
from ...blocks.stand_ins import PassThrough, Recording, RecordingBlock, ReplayFront
from ...errors import UnsupportedModelError
from .adapted_dit import AdaptedDit

TOLERANCE = 1e-3  # relative difference that a replayed model may show in half precision, as in the self-check


@torch.inference_mode(False)
@torch.no_grad()
def require_replay(dit: AdaptedDit, latent_shape: Sequence[int], caption: int = 0) -> None:
    """Check that a model whose blocks are replayed computes what the whole model does.

    First every block runs and is recorded; then the first half of the blocks is replaced by what was recorded, then all.

    Raises:
        UnsupportedModelError: If the outputs differ, as in models whose blocks exchange more than tokens.
    """
    latents = torch.randn(1, *latent_shape, generator=torch.Generator().manual_seed(2)).to(dit.device)
    sigmas = torch.full((1,), 0.5, device=dit.device)
    blocks, recordings = dit.blocks, [Recording() for _ in dit.blocks]
    own: dict[str, nn.Module] = {}
    with dit.running(own) as denoise:
        whole = denoise(latents, sigmas, [caption]).cpu()
    watched: dict[str, nn.Module] = {
        block.name: RecordingBlock(dit.module(block.name), block.io, recording)
        for block, recording in zip(blocks, recordings, strict=True)
    }
    with dit.running(watched) as denoise:
        outputs = [denoise(latents, sigmas, [caption]).cpu()]
    for cut in (len(blocks) // 2, len(blocks)):
        replay = Replay(front=recordings[cut - 1].leaving)
        replayed: dict[str, nn.Module] = {block.name: PassThrough(block.io) for block in blocks[: cut - 1]}
        replayed[blocks[cut - 1].name] = ReplayFront(blocks[cut - 1].io, replay)
        with dit.running(replayed) as denoise:
            outputs.append(denoise(latents, sigmas, [caption]).cpu())
    removed = (latents.cpu() - whole).norm().clamp_min(1e-12)
    worst = max(((output - whole).norm() / removed).item() for output in outputs)
    if not worst <= TOLERANCE:
        raise UnsupportedModelError(
            f"{dit.adapter.title}: with its blocks replayed the model computes something else than whole (relative "
            f"difference {worst:.1e}), because its blocks exchange more than the tokens that were found. Choose another "
            "model."
        )
