"""What a family of diffusers' transformers needs to be trained: a table of places, and a few functions.

Axis legend: ``B`` batch, ``C H W`` latent channels, rows, columns; ``N`` image tokens; ``L`` text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.token_places import ListLayout, TokenPlace

Text = Mapping[str, Tensor]
"""An encoded text: the transformer's arguments that belong to it, by their names there, batch axis 1."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of transformers.

    Attributes:
        name: Short name, stored in selections; the same as that of ComfyUI's models of the family.
        title: Name shown to users.
        model_class: Name of diffusers' class.
        pipelines: Names of diffusers' pipelines that make pictures from text with it.
        lists: Lists of blocks in execution order -> where their tokens are.
        stem: Modules before the first block; those that a variant lacks are passed over, and lists stand for their entries.
        head: Modules after the last block, likewise.
        velocity: (transformer, noisy (B, C, H, W), sigmas (B,), text) -> velocity (B, C, H, W).
        encode_text: (pipeline, text, device) -> the encoded text.
        encode_picture: (VAE, pixels (1, 3, h, w) in [-1, 1]) -> latent in the model's own scale, (1, C, H, W).
        channels: Configuration -> C.
        is_supported: Configuration -> whether this variant takes a text and nothing else.
        text_key: The argument whose second axis counts text tokens.
        patch: Side of a token in latent cells.
        padding: Image and text tokens are each padded to a multiple of this.
        vae_cells: Cells of the VAE on a side of a latent cell.
        cross_attention: Path within a block of the layer that the attention to the text enters; empty if text is in the
            stream.
        tables: Attributes that are no modules and keep tensors for the device of the last call.
        borrowed: Modules without weights that a run calls on the model itself: diffusers keeps what they compute under the
            module for the life of the process, so that every copy would stay too.
        patches: The paper's smallest and largest crop side in pixels, or FLUX's where the paper has none.
        mu: Number of image tokens -> the scheduler's mu; None for the form that is written in its configuration.
    """

    name: str
    title: str
    model_class: str
    pipelines: tuple[str, ...]
    lists: Mapping[str, ListLayout]
    stem: tuple[str, ...]
    head: tuple[str, ...]
    velocity: Callable[[Any, Tensor, Tensor, Text], Tensor]
    encode_text: Callable[[Any, str, torch.device], Text]
    encode_picture: Callable[[Any, Tensor], Tensor]
    channels: Callable[[Any], int] = lambda config: config.in_channels
    is_supported: Callable[[Any], bool] = lambda config: True
    text_key: str = "encoder_hidden_states"
    patch: int = 1
    padding: int = 1
    vae_cells: int = 1
    cross_attention: str = ""
    tables: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    patches: tuple[int, int] = (256, 512)
    mu: Callable[[int], float] | None = None

    def padded(self, tokens: int) -> int:
        """Return a number of tokens with its padding."""
        return -(-tokens // self.padding) * self.padding

    def layout_of(self, block: str) -> ListLayout:
        """Return where the tokens of a block are, by the block's path."""
        return self.lists[block.rpartition(".")[0]]


def separate_streams(*text_outputs: str) -> ListLayout:
    """Return the layout of ``block(hidden_states=, encoder_hidden_states=, ...) -> (text, image)``.

    Args:
        text_outputs: Linear layers of a block that change only its text tokens.
    """
    return ListLayout(
        img=TokenPlace(("hidden_states",), 1, 0),
        txt=TokenPlace(("encoder_hidden_states",), 0, 0),
        joined="",
        container=(tuple, 2),
        text_outputs=frozenset(text_outputs),
    )


IMAGE_ONLY = ListLayout(img=TokenPlace((0,), None, 0), txt=None, joined="", container=None)
"""``block(image, ...) -> image``; text is read by cross attention."""


def paths_of(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Return the paths of the modules that a model has; a list or dictionary of modules stands for its entries."""
    found: list[str] = []
    for name in names:
        module = model._modules.get(name)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found += [f"{name}.{child}" for child, _ in module.named_children()]
        elif module is not None:
            found.append(name)
    return found


def default_of_call(pipeline: Any, name: str) -> Any:
    """Return what a pipeline uses for an argument when it makes pictures, because its parts have other defaults."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def packed(latents: Tensor) -> Tensor:
    """Return tokens of 2 x 2 cells, (B, C, H, W) -> (B, N, 4 C)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of :func:`packed` in the size of ``like``."""
    rows, columns = like.shape[-2:]
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (rows // 2, columns // 2)), 2)


def grid(*axes: int, device: torch.device) -> Tensor:
    """Return the coordinates of the cells of a grid in row-major order, (cells, axes)."""
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in axes))


def shifted_and_scaled(vae: Any, pixels: Tensor) -> Tensor:
    """Encode a picture with an AutoencoderKL; the mode, not a sample, so that a crop always has the same latent."""
    return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


def normalised_frame(vae: Any, pixels: Tensor) -> Tensor:
    """Encode a picture with a video VAE whose configuration has mean and deviation of every channel; one frame."""
    latent = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, deviation = (
        torch.tensor(values, device=latent.device, dtype=latent.dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latent - mean) / deviation
