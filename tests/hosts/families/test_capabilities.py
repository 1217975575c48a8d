"""Optional capabilities of a family: checked where they are used, with a clear message where they are missing."""

import pytest
from blockskip_pack.blockskip_core.errors import UnsupportedModelError

from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def blocks_only(comfyui, monkeypatch):
    """FLUX.1 with an adapter that can only name its blocks."""
    from blockskip_pack.blockskip_core.hosts.families import registry, sampled_families
    from blockskip_pack.blockskip_core.hosts.families.base import FamilyAdapter
    from blockskip_pack.blockskip_core.hosts.families.flux import FluxAdapter

    class BlocksOnly(FamilyAdapter):
        family, title = "blocks", "Blocks only"
        stem, trainable_head, text_entry = FluxAdapter.stem, FluxAdapter.trainable_head, FluxAdapter.text_entry
        attention_layers, mlp_layers = FluxAdapter.attention_layers, FluxAdapter.mlp_layers
        matches, blocks = FluxAdapter.matches, FluxAdapter.blocks

    for module in (registry, sampled_families):
        monkeypatch.setattr(module, "ADAPTERS", (BlocksOnly,))
    return tiny_flux()


def test_every_listed_family_masks_text_and_places_tokens(comfyui):
    from blockskip_pack.blockskip_core.hosts.families.capabilities import MasksText, PlacesTokens
    from blockskip_pack.blockskip_core.hosts.families.registry import ADAPTERS

    others = [adapter for adapter in ADAPTERS if adapter.family != "minimax"]  # one row of picture, sound and text
    assert all(issubclass(adapter, MasksText) and issubclass(adapter, PlacesTokens) for adapter in others)


def test_an_adapter_that_knows_the_blocks_only_is_enough_to_train(blocks_only):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    assert len(HostedDit(blocks_only).blocks) > 0


def test_measuring_says_that_text_cannot_be_hidden(blocks_only):
    from blockskip_pack.blockskip_core.hosts.sampling.probe_pictures import MaskedSampler, ProbeConfig

    with pytest.raises(
        UnsupportedModelError,
        match="Blocks only models are not supported for hiding the text from blocks. Choose method preset or manual.",
    ):
        MaskedSampler(blocks_only, ProbeConfig())


def test_two_sizes_of_tokens_say_that_there_are_no_places(blocks_only):
    from blockskip_pack.blockskip_core.hosts.families.sampled_families import positions_of

    with pytest.raises(UnsupportedModelError, match="not supported for tokens of two sizes. Use KSampler."):
        positions_of(blocks_only)
