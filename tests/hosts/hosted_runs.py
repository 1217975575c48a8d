"""Runs of the tiny FLUX.1: the full model, the model with replayed residuals, a training, a sampled picture."""

from __future__ import annotations

import torch
from blockskip_pack.blockskip_core.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.skipping_model import SkippingModel

from ..core.plain_dit import MemorySource, lora_for, schedule, selection, train
from .tiny_flux import captions

LATENT_SHAPE = (4, 6, 10)  # fifteen image tokens
TEXT_LENGTHS = (5, 5, 3)  # of the captions
NUM_BLOCKS = 6
PLAN = schedule((0.3, 0.9, 0.55, 0.7), (0, 2, 1, 2))


def hosted(patcher, lengths=TEXT_LENGTHS, guidance: float | None = None):
    """Return the MODEL as a SkippableDit with captions of these lengths."""
    from blockskip_pack.blockskip_core.hosts.hosted_dit import HostedDit

    return HostedDit(patcher, captions(lengths, guidance=guidance), LATENT_SHAPE)


def plain_forward(patcher, noisy, sigmas, conditionings):
    """Return the clean estimate of the MODEL as a sampler of the host would get it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    settings = [conditioning[0][1] for conditioning in conditionings]
    arguments = {
        "c_crossattn": torch.cat([conditioning[0][0] for conditioning in conditionings]),
        "y": torch.cat([row["pooled_output"] for row in settings]),
    }
    if "guidance" in settings[0]:
        arguments["guidance"] = torch.tensor([row["guidance"] for row in settings])
    with torch.inference_mode():
        return patcher.model.apply_model(noisy, sigmas, transformer_options={}, **arguments).clone()


def clean_latents(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Clean latents, shape (count, C, H, W)."""
    return torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5)).to(dtype)


def chosen(front, back):
    """A selection for the tiny model."""
    return selection(front, back, NUM_BLOCKS)


def full_forward(dit, clean, draws):
    """The MODEL's own clean estimate of some draws."""
    noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
    rows = [dit._captions[PLAN[draw].caption] for draw in draws]
    return plain_forward(dit.patcher, noisy, sigmas, rows)


def replayed(dit, spans, residuals, clean, draws, adapters=None):
    """The skipping model's output, with the LoRA if one is given."""
    stand_ins = SkippingModel(dit, spans, checkpointed=False, folded=False)
    noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        stand_ins.replay(residuals.__getitem__, draws, None)
        if adapters is None:
            return denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])
        with adapters.attached(stand_ins.linears(), dit.weight_for_backward):
            return denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])


def flux_lora(dit, spans, **settings):
    """Adapters on the attention and MLP layers of the kept blocks."""
    settings = {"dtype": torch.float32, "size": 0.05, **settings}
    layers = dit.lora_layers(spans, "attention and mlp")
    return lora_for(dit, spans, wanted=layers.__contains__, **settings)


def run(patcher, spans, *, source=None, on_step=None, adapters=None, **settings):
    """Train; return (result, gradients of the last step, adapters)."""
    dit, clean = hosted(patcher), clean_latents()
    source = source or MemorySource(dit, spans, PLAN, clean)
    adapters = adapters or flux_lora(dit, spans)
    result, gradients = train(dit, spans, source, adapters, plan=PLAN, clean=clean, on_step=on_step, **settings)
    return result, gradients, adapters


def host_sample(patcher, conditioning=None, seed=3):
    """A latent sampled as a workflow of the host would sample it."""
    import comfy.sample

    empty = torch.zeros(1, *LATENT_SHAPE)
    conditioning = conditioning or captions()[0]
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(empty, seed), 3, 1.0, "euler", "simple", conditioning, conditioning, empty,
        disable_pbar=True, seed=seed,
    )  # fmt: skip
