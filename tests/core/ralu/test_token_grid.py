"""Tokens of two sizes: round trips, order and positions, compared with hand-written loops."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.ralu.token_grid import (
    MixedGrid,
    groups_of,
    latent_of,
    latent_of_groups,
    strip_of,
    tokens_of,
    tokens_of_strip,
    upsampled,
)

ROWS, COLUMNS, CHANNELS = 2, 3, 5  # of groups


def latent(batch=2, patch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, CHANNELS, 2 * ROWS * patch, 2 * COLUMNS * patch, generator=generator)


def some_fine():
    """Two of six groups, different ones in each picture."""
    fine = torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool)
    fine[0, 0, 1] = fine[0, 1, 2] = fine[1, 0, 0] = fine[1, 1, 1] = True
    return fine


def by_hand(fine, picture, patch):
    """Tokens, rows and columns of one picture, found by iterating over its full grid."""
    tokens, rows, columns = [], [], []
    for row in range(2 * ROWS):
        for column in range(2 * COLUMNS):
            if fine[row // 2, column // 2] or (row % 2 == 0 and column % 2 == 0):
                cells = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
                tokens.append(picture[:, cells[0], cells[1]])
                rows.append(row / 2)
                columns.append(column / 2)
    return torch.stack(tokens), rows, columns


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_and_groups_there_and_back(patch):
    full = latent(patch=patch)
    tokens = tokens_of(full, patch)
    assert torch.equal(latent_of(tokens, 2 * COLUMNS), full)
    assert torch.equal(tokens_of_strip(strip_of(tokens), patch), tokens)
    assert strip_of(tokens).shape == (2, CHANNELS, patch, tokens.shape[1] * patch)
    groups = groups_of(full, patch)
    assert groups.shape == (2, ROWS * COLUMNS, 4, CHANNELS * patch**2)
    assert torch.equal(latent_of_groups(groups, COLUMNS, patch), full)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_group_is_two_by_two_neighbouring_tokens(patch):
    tokens = tokens_of(latent(patch=patch), patch).reshape(2, 2 * ROWS, 2 * COLUMNS, -1)
    groups = groups_of(latent(patch=patch), patch)
    assert torch.equal(groups[:, 1 * COLUMNS + 2], tokens[:, 2:4, 4:6].reshape(2, 4, -1))


@pytest.mark.parametrize("patch", [1, 2])
def test_upsampling_copies_tokens(patch):
    coarse = latent(patch=patch)[..., : ROWS * patch, : COLUMNS * patch]
    groups = groups_of(upsampled(coarse, patch), patch)
    tokens = tokens_of(coarse, patch).flatten(2)
    assert torch.equal(groups, tokens[:, :, None].expand(-1, -1, 4, -1))


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_picked_in_raster_order_with_their_places(patch):
    fine, full = some_fine(), latent(patch=patch)
    grid = MixedGrid(fine)
    picked, places = grid.pick(full, patch), grid.places(2)
    assert grid.num_tokens == 6 + 3 * 2
    assert places.grid == (ROWS, COLUMNS)
    for index in range(2):
        tokens, rows, columns = by_hand(fine[index], full[index], patch)
        assert torch.equal(picked[index], tokens)
        assert places.rows[index].tolist() == rows
        assert places.columns[index].tolist() == columns


def test_spreading_is_the_inverse_of_picking():
    """On a latent whose coarse tokens are repeated four times, and for any strip of tokens."""
    grid = MixedGrid(some_fine())
    tokens = torch.randn(2, grid.num_tokens, CHANNELS, 2, 2)
    full = grid.spread(tokens)
    assert torch.equal(grid.pick(full, 2), tokens)
    assert torch.equal(grid.spread(grid.pick(full, 2)), full)
    groups = groups_of(full, 2)
    coarse = ~some_fine().flatten(1)
    assert torch.equal(groups[coarse], groups[coarse][:, :1].expand(-1, 4, -1))
    assert not torch.equal(groups[~coarse], groups[~coarse][:, :1].expand(-1, 4, -1))


def test_all_fine_is_the_full_grid_and_none_the_coarse_one():
    full = latent()
    everything = MixedGrid(torch.ones(2, ROWS, COLUMNS, dtype=torch.bool))
    assert everything.num_tokens == 4 * ROWS * COLUMNS
    assert torch.equal(everything.pick(full, 2), tokens_of(full, 2))
    places = everything.places(2, unit=1.0)
    assert places.grid == (2 * ROWS, 2 * COLUMNS)
    assert places.rows[0].reshape(2 * ROWS, -1)[:, 0].tolist() == [0, 1, 2, 3]
    assert places.columns[0].reshape(2 * ROWS, -1)[0].tolist() == [0, 1, 2, 3, 4, 5]
    nothing = MixedGrid(torch.zeros(2, ROWS, COLUMNS, dtype=torch.bool))
    coarse = full[..., : ROWS * 2, : COLUMNS * 2]
    assert torch.equal(nothing.pick(upsampled(coarse, 2), 2), tokens_of(coarse, 2))
    assert nothing.places(2).columns[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_guided_and_unguided_calls_go_together():
    """ComfyUI joins them into one batch: all pictures once, then all again."""
    grid, full = MixedGrid(some_fine()), latent()
    twice = torch.cat((full, 2 * full))
    picked = grid.pick(twice, 2)
    assert torch.equal(picked, torch.cat((grid.pick(full, 2), 2 * grid.pick(full, 2))))
    assert torch.equal(grid.spread(picked)[:2], grid.spread(grid.pick(full, 2)))
    assert torch.equal(grid.places(4).rows, grid.places(2).rows.repeat(2, 1))


def test_one_picture_has_places_for_any_batch():
    grid = MixedGrid(some_fine()[:1])
    assert grid.places(2).rows.shape == (1, grid.num_tokens)


def test_pictures_with_different_numbers_of_fine_regions_are_refused():
    fine = some_fine()
    fine[1, 1, 2] = True
    with pytest.raises(InvalidInputError, match=r"must have equally many fine regions, got \[2, 3\]"):
        MixedGrid(fine)
