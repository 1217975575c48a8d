"""Tokens of two sizes in every family's own forward, compared with the plain model and a hand-written forward."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.ralu.token_grid import (
    MixedGrid,
    TokenPlaces,
    latent_of,
    strip_of,
    tokens_of,
    tokens_of_strip,
    upsampled,
)

from ..followed_families import PLACED
from ..tiny_flux import assert_same_weights, captions, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

ROWS, COLUMNS = 4, 6  # of fine tokens
SIGMA = 0.6
# Families that cut latents into tokens by a convolution, whose rounding depends on the shape of the picture.
CONVOLVED = {"sd35", "wan21", "wan22", "hunyuan_image", "ernie"}
each_family = pytest.mark.parametrize("family", PLACED, ids=lambda family: family.name)


def adapted(patcher):
    """A loaded clone with what the family's positions need; those positions; the side of a token."""
    from blockskip_pack.blockskip_core.hosts.families.sampled_families import positions_of

    (positions, patch), clone = positions_of(patcher), patcher.clone()
    positions.prepare(clone)
    return clone, positions, patch


def latents(family, patch, batch=2, rows=ROWS, columns=COLUMNS):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(batch, family.latent_shape[0], rows * patch, columns * patch, generator=generator)


def forward(family, patcher, latent):
    return family.plain_forward(patcher, latent, torch.full((len(latent),), SIGMA), family.captions((5,)) * len(latent))


def on_strip(family, patcher, positions, tokens, places, patch):
    with positions.placed(places, {}):
        return tokens_of_strip(forward(family, patcher, strip_of(tokens)), patch)


def assert_same(family, found, expected):
    """Bit for bit where tokens are cut without rounding."""
    tolerance = 1e-5 if family.name in CONVOLVED else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each_family
def test_all_tokens_fine_is_the_plain_model(family):
    patcher, positions, patch = adapted(family.build())
    latent = latents(family, patch)
    grid = MixedGrid(torch.ones(2, ROWS // 2, COLUMNS // 2, dtype=torch.bool))
    tokens = grid.pick(latent, patch)
    answer = on_strip(family, patcher, positions, tokens, grid.places(2, unit=1.0), patch)
    assert_same(family, latent_of(answer, COLUMNS), forward(family, patcher, latent))


@each_family
def test_all_tokens_coarse_is_the_plain_model_at_half_the_side(family):
    from blockskip_pack.blockskip_core.hosts.sampling.token_strips import TokenStrips

    patcher = family.build()
    strips = TokenStrips(patcher)
    patch = strips.patch
    coarse = latents(family, patch, rows=ROWS // 2, columns=COLUMNS // 2)
    expected = forward(family, patcher, coarse)
    strips.grid = MixedGrid(torch.zeros(2, ROWS // 2, COLUMNS // 2, dtype=torch.bool))
    assert_same(family, through_the_wrapper(family, strips, upsampled(coarse, patch)), upsampled(expected, patch))


def through_the_wrapper(family, strips, latent, sigmas=None, arguments=None):
    """The clean estimate of a full-size latent, as a sampler gets it from the clone."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([strips.patcher])
    options = {"wrappers": strips.patcher.wrappers}  # as passed on by ComfyUI's samplers
    rows = family.captions((5,)) * len(latent)
    text = torch.cat([conditioning[0][0] for conditioning in rows])
    arguments = arguments or family.extra(text, [conditioning[0][1] for conditioning in rows])
    given = latent[:, :, None] if family.frames else latent
    sigmas = torch.full((len(latent),), SIGMA) if sigmas is None else sigmas
    with torch.inference_mode():
        denoised = strips.patcher.model.apply_model(given, sigmas, transformer_options=options, **arguments).clone()
    return denoised[:, :, 0] if family.frames else denoised


@each_family
def test_tokens_in_any_order_answer_for_their_places(family):
    """Positions apply token by token, and each picture of a batch has its own."""
    patcher, positions, patch = adapted(family.build())
    latent = latents(family, patch)
    tokens = tokens_of(latent, patch)
    order = torch.stack([torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(i)) for i in (1, 2)])
    index = order[..., None, None, None].expand_as(tokens)
    places = TokenPlaces((order // COLUMNS).float(), (order % COLUMNS).float(), (ROWS, COLUMNS))
    found = on_strip(family, patcher, positions, tokens.gather(1, index), places, patch)
    expected = tokens_of(forward(family, patcher, latent), patch).gather(1, index)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    elsewhere = TokenPlaces(places.rows.flip(1), places.columns, places.grid)
    moved = on_strip(family, patcher, positions, tokens.gather(1, index), elsewhere, patch)
    assert float((moved - expected).abs().max()) > 1e-3


@each_family
def test_afterwards_the_model_is_as_before(family):
    patcher, positions, patch = adapted(family.build())
    before, latent = weights(patcher), latents(family, patch)
    expected = forward(family, patcher, latent)
    grid = MixedGrid(torch.ones(2, ROWS // 2, COLUMNS // 2, dtype=torch.bool))
    on_strip(family, patcher, positions, grid.pick(latent, patch), grid.places(2), patch)
    with pytest.raises(KeyboardInterrupt), positions.placed(grid.places(2), {}):
        raise KeyboardInterrupt
    assert torch.equal(forward(family, patcher, latent), expected)
    assert_same_weights(patcher, before)
    assert not any(module._forward_pre_hooks for module in patcher.model.modules())


def test_a_mixed_set_of_flux_tokens_against_a_forward_built_by_hand():
    """Tokens, coordinates and their order built by loops, passed to the layers directly."""
    import comfy.model_management

    patcher, patch = tiny_flux(guidance=True), 2
    clone, positions, _ = adapted(patcher)
    fine = torch.zeros(1, 2, 3, dtype=torch.bool)
    fine[0, 0, 2] = fine[0, 1, 1] = True
    coarse = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    full = upsampled(coarse, patch)
    full[:, :, 4:8, 4:8] += 0.3 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    tokens, ids = [], []
    for row in range(ROWS):
        for column in range(COLUMNS):
            if fine[0, row // 2, column // 2] or (row % 2 == 0 and column % 2 == 0):
                cell = full[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                tokens.append(cell.reshape(-1))  # channel, row, column
                ids.append([0.0, row / 2, column / 2])
    ((text, settings),) = captions((5,), guidance=3.5)[0]
    flux = patcher.model.diffusion_model
    comfy.model_management.load_models_gpu([clone])
    with torch.inference_mode():
        velocity = flux.forward_orig(
            torch.stack(tokens)[None], torch.tensor(ids)[None], text, torch.zeros(1, 5, 3), torch.tensor([SIGMA]),
            settings["pooled_output"], torch.tensor([3.5]),
        )  # fmt: skip
    from ..tiny_families import FLUX

    grid = MixedGrid(fine)
    picked = grid.pick(full, patch)
    with positions.placed(grid.places(1), {}):
        answer = FLUX.plain_forward(clone, strip_of(picked), torch.tensor([SIGMA]), [[[text, settings]]])
    expected = picked - SIGMA * velocity.reshape(1, -1, 4, 2, 2)
    assert torch.equal(tokens_of_strip(answer, patch), expected)


def test_places_are_stretched_and_moved_as_the_host_does_it():
    """Another node may have set this; it then applies to the tokens of a strip as to a picture."""
    from blockskip_pack.blockskip_core.hosts.families.token_positions import RotaryPositions, last_tokens

    module = torch.nn.Identity()
    places = TokenPlaces(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.0, 2.0, 2.5]]), (2, 3))
    options = {"rope_options": {"scale_y": 2.0, "scale_x": 3.0, "shift_y": 10.0, "shift_x": 20.0}}
    ids = torch.zeros(1, 5, 3)
    with RotaryPositions(module, last_tokens, stretched=True).placed(places, options):
        assert module(ids)[0, 2:].tolist() == [[0, 10, 20], [0, 11, 26], [0, 12, 27.5]]
    with RotaryPositions(module, last_tokens, stretched=False).placed(places, options):
        assert module(ids)[0, 2:].tolist() == [[0, 0, 0], [0, 0.5, 2], [0, 1, 2.5]]
    assert torch.equal(module(ids), ids)


def test_half_steps_in_a_model_that_counts_in_bfloat16():
    from blockskip_pack.blockskip_core.hosts.families.token_positions import RotaryPositions, last_tokens

    module = torch.nn.Identity()
    places = TokenPlaces(torch.tensor([[300.5]]), torch.tensor([[256.5]]), (512, 512))
    with RotaryPositions(module, last_tokens, stretched=True).placed(places, {}):
        assert module(torch.zeros(1, 2, 3, dtype=torch.bfloat16))[0, 1].tolist() == [0, 300.5, 256.5]


def test_a_table_is_read_between_its_rows():
    """Half a step is the mean of two rows; beyond the picture the table continues, unless it ends there."""
    from blockskip_pack.blockskip_core.hosts.families.token_positions import TablePositions

    side, width = 6, 3
    table = torch.randn(side, side, width, dtype=torch.float64).float()

    def crop(hw, device=None):
        rows, columns = hw[0] // 2, hw[1] // 2
        top, left = (side - rows) // 2, (side - columns) // 2
        return table[top : top + rows, left : left + columns].reshape(1, -1, width)

    class Patcher:
        def get_model_object(self, name):
            return crop

        def add_object_patch(self, name, value):
            self.patched = value

    def rows_at(places):
        positions, patcher = TablePositions("a.method", 2, side), Patcher()
        positions.prepare(patcher)
        with positions.placed(places, {}):
            found = patcher.patched((2, 2), device=torch.device("cpu"))
        assert torch.equal(patcher.patched((4, 8)), crop((4, 8)))
        return found[0]

    rows, columns = torch.tensor([[0.0, 1.0, 0.5, 1.5]]), torch.tensor([[0.0, 2.0, 1.5, 3.5]])
    found = rows_at(TokenPlaces(rows, columns, (2, 4)))  # the picture starts at row 2, column 1 of the table
    assert torch.equal(found[0], table[2, 1])
    assert torch.equal(found[1], table[3, 3])
    torch.testing.assert_close(found[2], table[2:4, 2:4].mean((0, 1)))
    torch.testing.assert_close(found[3], table[3:5, 4:6].mean((0, 1)))
    whole = rows_at(TokenPlaces(torch.tensor([[5.5]]), torch.tensor([[0.5]]), (6, 6)))
    torch.testing.assert_close(whole[0], table[5, 0:2].mean(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": {"input": []}}, "a ControlNet"),
        ({"c_concat": torch.zeros(1, 1, 8, 12)}, "a picture besides the latent"),
        ({"ref_latents": [torch.zeros(1, 4, 8, 12)]}, "ref_latents"),
        ({"attention_mask": torch.zeros(1, 29, 29)}, "an image prompt with a mask"),
    ],
)
def test_what_has_a_size_of_its_own_is_refused(changes, message):
    from blockskip_pack.blockskip_core.hosts.sampling.token_strips import TokenStrips

    strips = TokenStrips(tiny_flux())
    options = {"wrappers": strips.patcher.wrappers}
    with pytest.raises(InvalidInputError, match=message):
        strips.patcher.model.apply_model(
            torch.zeros(1, 4, 8, 12), torch.tensor([SIGMA]), transformer_options=options, **changes
        )
