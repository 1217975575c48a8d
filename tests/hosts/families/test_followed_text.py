"""The text hidden from the blocks of models that were followed, on tiny random models of ComfyUI's own classes."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.errors import UnsupportedModelError
from blockskip_pack.blockskip_core.hosts.families.hidden_text import hide_text
from torch import nn

from ..followed_families import FOLLOWED, family

pytestmark = pytest.mark.usefixtures("comfyui")

CANNOT = {"ernie": "its attention is not given the options of a call"}
CROSS = (
    "kandinsky5",
    "kandinsky5_video",
    "anima",
    "ltxv",
    "ltx2",
    "ltx25",
)  # attention to the text is a call of its own
IMAGE_FIRST = ("lens", "hidream", "joyimage")
HIDDEN = [tiny for tiny in FOLLOWED if tiny.name not in CANNOT]


class Sampled:
    """One step of a model as ComfyUI samples it, at 8 x 8 cells.

    Attributes:
        count: Number of blocks.
        cells: Side of the latent.
    """

    cells = 8

    def __init__(self, tiny) -> None:
        from blockskip_pack.blockskip_core.hosts.sampling.probe_pictures import MaskedSampler, ProbeConfig

        self._tiny, self._patcher = tiny, tiny.build()
        ratio = self._patcher.model.latent_format.spacial_downscale_ratio
        self._sampler = lambda patcher: MaskedSampler(
            patcher, ProbeConfig(size=self.cells * ratio, steps=1), [self.words(1)]
        )
        self.sampler = self._sampler(self._patcher)
        self.count = len(self.sampler._adapter.blocks())

    def words(self, seed: int) -> list:
        """A text; all have the same pooled vector, mask and so on."""
        tiny, first = self._tiny, self._tiny.captions((5,), seed=1)[0]
        [[text, settings]] = tiny.captions((5,), seed=seed)[0]
        own = {name: value for name, value in settings.items() if name == "conditioning_llama3"}
        return [[text, {**first[0][1], **own}]]

    def step(self, masked=(), seed=1, override=None, wrapper=None) -> torch.Tensor:
        sampler = self.sampler
        if override or wrapper:
            patcher = self._patcher.clone()
            if override:
                patcher.model_options["transformer_options"]["optimized_attention_override"] = override
            if wrapper:
                patcher.add_wrapper_with_key("apply_model", "test", wrapper)
            sampler = self._sampler(patcher)
        words = self.words(seed)
        return sampler.sample(words, words, seed=3, masked=frozenset(masked))


@pytest.fixture(params=HIDDEN, ids=lambda tiny: tiny.name, scope="module")
def tiny(request):
    return request.param


@pytest.fixture(scope="module")
def sampled(comfyui, tiny):
    return Sampled(tiny)


def test_hidden_everywhere_the_words_do_not_matter_and_in_all_but_one_block_they_do(sampled):
    everywhere = frozenset(range(sampled.count))
    assert torch.equal(sampled.step(everywhere, seed=1), sampled.step(everywhere, seed=2))
    for left_out in (0, sampled.count - 1):
        first, second = (sampled.step(everywhere - {left_out}, seed) for seed in (1, 2))
        assert not torch.equal(first, second), left_out
    sampled.sampler.require_hidden(sampled.words(1))


def test_hidden_nowhere_it_is_the_plain_model(sampled):
    nothing = sampled.sampler._masking.text_masking_wrapper(frozenset())
    assert torch.equal(sampled.step(wrapper=nothing), sampled.step())


def test_hidden_everywhere_is_a_masked_softmax_everywhere(tiny, sampled):
    """Compared with ComfyUI's own attention with a dense mask; where text has separate attention, with zeros."""
    from comfy.ldm.modules.attention import attention_pytorch

    side = sampled.sampler._adapter.patch_size
    num_image = (sampled.cells // side) ** 2

    def by_hand(_, q, k, v, heads, mask=None, *args, skip_reshape=False, enable_gqa=False, **kwargs):
        axis = 2 if skip_reshape else 1
        queries, keys = q.shape[axis], k.shape[axis]
        plain = attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, enable_gqa=enable_gqa)
        if tiny.name in CROSS:
            return torch.zeros_like(plain) if queries == num_image != keys else plain
        if queries <= num_image:  # of refiners, or among image tokens only
            return plain
        is_image = (
            torch.arange(keys) < num_image if tiny.name in IMAGE_FIRST else torch.arange(keys) >= keys - num_image
        )
        unseen = torch.zeros(queries, keys).masked_fill(is_image[:, None] & ~is_image, -torch.inf)
        unseen = unseen if mask is None else unseen + mask
        return attention_pytorch(q, k, v, heads, mask=unseen, skip_reshape=skip_reshape, enable_gqa=enable_gqa)

    found, expected = sampled.step(range(sampled.count)), sampled.step(override=by_hand)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


# --- refused -----------------------------------------------------------------------------------------------------


def test_attention_that_is_not_seen_is_refused(comfyui):
    with pytest.raises(
        UnsupportedModelError, match="ErnieImage models do not use ComfyUI's attention in a way .* preset"
    ):
        Sampled(family("ernie"))


def test_text_that_comes_another_way_is_refused(comfyui, monkeypatch):
    sampled = Sampled(family("mage_flow"))
    model = sampled._patcher.model.diffusion_model
    plain = type(model).forward

    def forward(self, x, timesteps, context, **kwargs):
        return plain(self, x + context[:, :1, :1, None], timesteps, context, **kwargs)

    sampled.sampler.require_hidden(sampled.words(1))
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(
        UnsupportedModelError, match="the text reaches the picture even if it is hidden .* preset or manual"
    ):
        sampled.sampler.require_hidden(sampled.words(1))


@pytest.mark.parametrize("calls", [0, 2])
def test_another_number_of_attention_calls_is_refused(calls):
    def attention(q, k, v, **_):
        return q

    class Block(nn.Module):
        def forward(self, x, options):
            for _ in range(calls):
                x = options["optimized_attention_override"](attention, x, x, x)
            return x

    model = nn.Module()
    model.blocks = nn.ModuleList([Block()])
    wrapper = hide_text(model, {"blocks.0": ("none",)}, lambda latent, references: 4)
    with pytest.raises(
        UnsupportedModelError, match="blocks.0 calls attention another number of times .* preset or manual"
    ):
        wrapper(lambda x, t, concat, text, control, options: model.blocks[0](x, options), torch.zeros(1, 4, 2), None)
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks
