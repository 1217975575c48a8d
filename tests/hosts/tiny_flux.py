"""A FLUX.1 of ComfyUI's own classes, small enough for a test, wrapped as a MODEL."""

from __future__ import annotations

import torch


def tiny_flux(
    *, depth: int = 2, depth_single: int = 4, width: int = 64, heads: int = 2, guidance: bool = False,
    dtype: torch.dtype = torch.float32, cast_to: torch.dtype | None = None, seed: int = 0, scale: float = 1.0,
    channels: int = 4, mlp_ratio: float = 2.0,
):  # fmt: skip
    """Return a ModelPatcher around a random FLUX.1; its inputs are latents (B, 4, 8, 8) and context (B, L, 16).

    With ``cast_to`` ComfyUI keeps the weights in ``dtype`` and casts them for every call.
    """
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    head = width // heads
    third = head // 4 // 2 * 2
    config = {
        "image_model": "flux",
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": 2,
        "vec_in_dim": 16,
        "context_in_dim": 16,
        "hidden_size": width,
        "mlp_ratio": mlp_ratio,
        "num_heads": heads,
        "depth": depth,
        "depth_single_blocks": depth_single,
        "axes_dim": [head - 2 * third, third, third],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": guidance,
        "txt_ids_dims": [],
    }
    supported = (comfy.supported_models.Flux if guidance else comfy.supported_models.FluxSchnell)(config)
    supported.custom_operations = None
    supported.set_inference_dtype(dtype, cast_to)
    supported.latent_format = _four_channels()
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():  # as ComfyUI's loaders do
        model = comfy.model_base.Flux(supported, device="cpu")
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * fan * scale
            parameter.copy_(1.0 + 0.1 * noise if name.endswith(("norm.scale", "norm.weight")) else noise)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def _four_channels():
    """Return a latent format with a scale and a shift, so that applying it twice or not at all is noticed."""
    import comfy.latent_formats

    class FourChannels(comfy.latent_formats.LatentFormat):
        latent_channels = 4
        scale_factor, shift_factor = 0.5, 0.25

        def process_in(self, latent):
            return (latent - self.shift_factor) * self.scale_factor

        def process_out(self, latent):
            return latent / self.scale_factor + self.shift_factor

    return FourChannels()


def captions(lengths=(5,), seed: int = 1, guidance: float | None = None) -> list[list]:
    """Return single conditionings with these numbers of text tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        settings = {"pooled_output": torch.randn(1, 16, generator=generator)}
        if guidance is not None:
            settings["guidance"] = guidance
        made.append([[torch.randn(1, length, 16, generator=generator), settings]])
    return made


def weights(patcher) -> dict[str, torch.Tensor]:
    """Return copies of all weights of the MODEL."""
    return {name: tensor.detach().clone() for name, tensor in patcher.model.state_dict().items()}


def assert_same_weights(patcher, before: dict[str, torch.Tensor]) -> None:
    """Compare every weight bit for bit."""
    now = patcher.model.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name
