"""The world's autoencoder: ComfyUI's tiny-autoencoder layout, trained as a slimmer network inside it.

The layout has 64 channels everywhere. A slim twin with fewer channels and fewer blocks computes the same function
once its weights are put into the corners of zero tensors: an absent block is then ``relu(x)``, as in the twin.
"""

from __future__ import annotations

import torch
from comfy.taesd.taesd import TAESD, Block, Clamp, conv
from torch import Tensor, nn

LATENT_CHANNELS = 16
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
ENCODER_WIDTHS, ENCODER_BLOCKS = (16, 32, 64, 64), (0, 1, 1, 2)
DECODER_WIDTHS, DECODER_BLOCKS = (32, 48, 64, 64), (1, 2, 2, 3)
STAGE_SLOTS = (1, 3, 3, 3)  # blocks per stage in the full layout, from the picture to the latent


def _stage(width: int, blocks: int, slots: int) -> list[nn.Module]:
    """``slots`` modules of which the first ``blocks`` are residual blocks."""
    return [Block(width, width) if i < blocks else nn.ReLU() for i in range(slots)]


class SlimCoder(nn.Module):
    """Encoder and decoder of pictures ``[B, 3, H, W]`` in [0, 1] and latents ``[B, 16, H/8, W/8]``."""

    def __init__(self) -> None:
        super().__init__()
        widths, blocks = ENCODER_WIDTHS, ENCODER_BLOCKS
        layers = [conv(3, widths[0]), *_stage(widths[0], blocks[0], STAGE_SLOTS[0])]
        for i in range(1, 4):
            layers += [conv(widths[i - 1], widths[i], stride=2, bias=False)]
            layers += _stage(widths[i], blocks[i], STAGE_SLOTS[i])
        self.taesd_encoder = nn.Sequential(*layers, conv(widths[3], LATENT_CHANNELS))
        widths, blocks = DECODER_WIDTHS, DECODER_BLOCKS
        layers = [Clamp(), conv(LATENT_CHANNELS, widths[3]), nn.ReLU()]
        for i in (3, 2, 1):
            layers += _stage(widths[i], blocks[i], STAGE_SLOTS[i])
            layers += [nn.Upsample(scale_factor=2), conv(widths[i], widths[i - 1], bias=False)]
        self.taesd_decoder = nn.Sequential(
            *layers, *_stage(widths[0], blocks[0], STAGE_SLOTS[0]), conv(widths[0], 3)
        )
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation, with small last convolutions in the residual branches."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                module.conv[-1].weight.data.mul_(0.3)
        self.taesd_decoder[-1].weight.data.mul_(0.1)
        self.taesd_decoder[-1].bias.data.fill_(0.5)

    def encode(self, pictures: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to a FLUX model's ``[B, 16, H/8, W/8]`` of about unit variance."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """``[B, 16, h, w]`` back to ``[B, 3, 8h, 8w]`` in about [0, 1]."""
        return self.taesd_decoder(latents)


def full_state_dict(slim: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slim twin's weights in the full layout, with FLUX's scale and shift, for the "Load VAE" node."""
    full = TAESD(latent_channels=LATENT_CHANNELS).state_dict()
    state = {key: torch.zeros_like(value) for key, value in full.items()}
    for key, value in slim.items():
        state[key][tuple(slice(0, n) for n in value.shape)] = value
    state["vae_scale"] = torch.tensor(FLUX_SCALE)
    state["vae_shift"] = torch.tensor(FLUX_SHIFT)
    return state


def slim_state_dict(full: dict[str, Tensor], slim: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`full_state_dict`: the corners of ``full`` that have the shapes of ``slim``."""
    return {key: full[key][tuple(slice(0, n) for n in value.shape)].float() for key, value in slim.items()}


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of values and of differences between neighbours, for sharp edges; ``[B, 3, H, W]`` each."""
    error = output - target
    rows, columns = error.diff(dim=-2).abs().mean(), error.diff(dim=-1).abs().mean()
    return error.abs().mean() + 0.5 * (rows + columns) + error.square().mean()


def moment_loss(latents: Tensor) -> Tensor:
    """Pull every latent channel ``[B, C, h, w]`` to zero mean and unit variance."""
    mean, variance = latents.mean(dim=(0, 2, 3)), latents.var(dim=(0, 2, 3))
    return mean.square().mean() + variance.clamp_min(1e-4).log().square().mean()
