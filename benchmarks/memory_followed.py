"""How the blocks of a published model take their tokens, for models that have no file and are followed.

A model without values cannot be followed. So a few blocks of each list are made at full width on the CPU, with random values,
and followed there; the layout does not depend on the number of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from blockskip_pack.blockskip_core.hosts.families import published_sizes
from blockskip_pack.blockskip_core.hosts.families.block_lists import block_lists
from blockskip_pack.blockskip_core.hosts.families.followed import FollowedAdapter, ModelLayout
from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from torch import nn

META = torch.device("meta")
DEPTHS = (
    "layers", "num_layers", "n_layers", "n_double_layers", "depth", "depth_single_blocks", "num_double_stream_layers",
    "num_visual_blocks", "num_blocks",
)  # fmt: skip  # the lists' lengths in a configuration
TOGETHER = ("n_layers",)  # the length of two lists together
PREPARING = ("num_refiner_layers", "num_text_blocks")  # of lists that only prepare the tokens: one block is enough
NOT_IN_FILE = {"Ernie-Image": {"num_layers"}}  # lengths that the host does not read from the file
SPREAD = 0.02  # standard deviation of the weights
SMALL, TEXT = 4, 16  # cells per side of the latents, and text tokens, with which a model is followed


def is_followed(name: str) -> bool:
    """Return whether a published model is of a kind without a file."""
    model = published_sizes.published_model(name)
    return isinstance(adapter_for(SimpleNamespace(model=model)), FollowedAdapter)


def followed_dits(
    name: str, caption: list, latent_shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[WeightlessDit]:
    """Return a published model without weights in several dtypes, ready to be counted.

    Args:
        name: A key of ``published_sizes.PUBLISHED_SIZES``.
        caption: A conditioning, ``[[tensor, settings]]``.
        latent_shape: (C, H, W).
        dtypes: Of the weights; the host casts those of eight bits to bfloat16 for every use.
    """
    shallow = _shallow(name)
    layout = _followed(shallow, caption, latent_shape[0])
    arguments = HostedDit(shallow, [caption], latent_shape).arguments
    dits = []
    for dtype in dtypes:
        model = published_sizes.published_model(name, dtype, torch.bfloat16 if dtype.itemsize < 2 else None)
        dits.append(WeightlessDit(model, arguments, torch.device("cuda")))
        dits[-1].adapter.layout = layout  # type: ignore[attr-defined]
    return dits


def layout_of(name: str, caption: list, channels: int) -> ModelLayout:
    """Return the layout of a published model.

    Args:
        name: A key of ``published_sizes.PUBLISHED_SIZES``.
        caption: A conditioning, ``[[tensor, settings]]``.
        channels: Of its latents.
    """
    return _followed(_shallow(name), caption, channels)


def _followed(shallow: Any, caption: list, channels: int) -> ModelLayout:
    [[text, settings]] = caption
    shorter = {**settings, **{key: settings[key][:, :TEXT] for key in ("attention_mask",) if key in settings}}
    adapter = HostedDit(shallow, [[[text[:, :TEXT], shorter]]], (channels, SMALL, SMALL)).adapter
    assert isinstance(adapter, FollowedAdapter)
    return adapter.found


@torch.inference_mode()
def _shallow(name: str) -> Any:
    """Return a MODEL with few blocks of full width, those of a list with the same weights."""
    import comfy.model_patcher

    cpu = torch.device("cpu")
    model = _with_blocks(name, _fewest_blocks(name), cpu)
    tree = model.diffusion_model
    for blocks in map(tree.get_submodule, block_lists(tree)):
        first, *others = blocks.children()
        for other in others:
            _share_weights(first, other)
    for tensor in {tensor.data_ptr(): tensor for tensor in tree.state_dict().values()}.values():
        tensor.normal_(0.0, SPREAD)
    return comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def _share_weights(first: nn.Module, other: nn.Module) -> None:
    """Give a block another one's weights, where their shapes are equal; several at full width take too much memory."""
    for path, layer in other.named_modules():
        twins = first.get_submodule(path)._parameters
        for key, tensor in layer._parameters.items():
            if tensor is not None and tensor.shape == twins[key].shape:
                layer._parameters[key] = nn.Parameter(twins[key].data, tensor.requires_grad)  # counts by itself


def _fewest_blocks(name: str) -> int:
    """Return the least number with which no list that only prepares the text is taken for blocks."""
    lists = block_lists(published_sizes.published_model(name).diffusion_model)
    return next(n for n in count(2) if block_lists(_with_blocks(name, n, META).diffusion_model) == lists)


def _with_blocks(name: str, blocks: int, device: torch.device) -> Any:
    """Return the host's model with so many blocks in each list, in float32."""
    import comfy.supported_models

    size = published_sizes.PUBLISHED_SIZES[name]
    named = {key for key, value in size.config.items() if value != 0} | NOT_IN_FILE.get(name, set())
    depths = dict.fromkeys(DEPTHS, blocks) | dict.fromkeys(TOGETHER, 2 * blocks) | dict.fromkeys(PREPARING, 1)
    config = {**size.config, **{key: depths[key] for key in depths.keys() & named}}
    described = getattr(comfy.supported_models, size.supported)(config)
    described.custom_operations = None
    described.set_inference_dtype(torch.float32, None)
    return described.get_model({}, "", device=device)
