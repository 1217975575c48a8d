"""Which regions are refined early, on pictures with known edges; and the picture of that choice."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.ralu.overlay import refined_overlay
from blockskip_pack.blockskip_core.ralu.regions import choose_regions, edge_scores, gradient_scores, masked_tokens

GRID = (2, 3)  # of tokens with 16 pixels each


def picture(low=0.0, high=1.0):
    """A step down the middle of the token in the first row and second column."""
    made = torch.full((1, 32, 48, 3), low)
    made[:, :16, 24:] = high
    return made


def test_edges_are_counted_in_their_token():
    """A vertical line of sixteen pixels; the only other edge is the step at the row's lower border."""
    scores = edge_scores(picture(), GRID)[0]
    assert scores.shape == GRID
    assert scores[0, 1] > scores[0, 0] == 0.0
    assert scores[1, 0] == 0.0
    assert float(scores[0, 1]) * 256 >= 14


def test_an_edge_in_the_dark_half_is_seen_unless_asked_otherwise():
    dark, bright = picture(0.0, 0.5), picture(0.5, 1.0)
    assert edge_scores(dark, GRID)[0, 0, 1] > 0.0
    assert edge_scores(dark, GRID, bright_half_only=True).sum() == 0.0
    assert edge_scores(bright, GRID, bright_half_only=True)[0, 0, 1] > 0.0


def test_gradients_of_a_latent_are_summed_in_their_token():
    latent = torch.zeros(2, 4, 4, 6)
    latent[1, :, :2, 3:] = 1.0
    scores = gradient_scores(latent, GRID)
    assert scores[0].sum() < 1e-2
    assert scores[1].flatten().argmax() == 1


@pytest.mark.parametrize(("ratio", "number"), [(0.0, 0), (0.2, 1), (0.5, 3), (1.0, 6)])
def test_the_highest_scores_are_taken_and_the_number_is_rounded_down(ratio, number):
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]], [[0.6, 0.1, 0.2], [0.3, 0.4, 0.5]]])
    chosen = choose_regions(scores, ratio, None, torch.zeros_like(scores))
    for own, of in zip(chosen, scores, strict=True):
        assert int(own.sum()) == number
        assert sorted(of[own].tolist()) == sorted(of.flatten().tolist())[6 - number :]


def test_equal_scores_are_decided_by_the_noise_not_by_the_order():
    scores = torch.zeros(1, 2, 3)
    noise = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 3.0, 1.0]]])
    assert choose_regions(scores, 2 / 6, None, noise)[0].nonzero().tolist() == [[1, 1], [1, 2]]


def test_forced_tokens_come_first_and_add_no_more_than_they_must():
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.8, 0.2, 0.7]]])
    forced = torch.zeros(1, 2, 3, dtype=torch.bool)
    forced[0, 0, 0] = True
    chosen = choose_regions(scores, 0.5, forced, torch.zeros_like(scores))[0]
    assert chosen.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert choose_regions(scores, 0.0, forced, torch.zeros_like(scores)).sum() == 1


def test_pictures_of_a_batch_get_as_many_regions_as_the_one_with_the_largest_mask():
    forced = torch.zeros(2, 2, 3, dtype=torch.bool)
    forced[0, 0] = True
    chosen = choose_regions(torch.rand(2, 2, 3), 0.2, forced, torch.zeros(2, 2, 3))
    assert chosen.flatten(1).sum(1).tolist() == [3, 3]
    assert torch.equal(chosen[0], forced[0])


def test_a_mask_covers_a_token_by_half():
    mask = torch.zeros(1, 32, 48)
    mask[0, :16, :8] = 1.0
    mask[0, 16:, :7] = 1.0
    assert masked_tokens(mask, GRID)[0].nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(InvalidInputError, match="share of early regions must be between 0 and 1"):
        choose_regions(torch.zeros(1, 2, 3), ratio, None, torch.zeros(1, 2, 3))


def test_the_overlay_tints_what_is_fine_and_dims_the_rest():
    fine = torch.zeros(1, *GRID, dtype=torch.bool)
    fine[0, 0, 1] = True
    shown = refined_overlay(fine, (64, 96), torch.full((1, 32, 48, 3), 0.8))
    assert shown.shape == (1, 64, 96, 3)
    inside, outside = shown[0, 16, 48], shown[0, 48, 16]
    assert inside[0] > inside[2]
    assert outside[0] == outside[2] < 0.8
    assert torch.equal(shown[0, :32, 32:64], inside.expand(32, 32, 3))


def test_the_overlay_needs_no_picture():
    assert refined_overlay(torch.ones(2, *GRID, dtype=torch.bool), (32, 48)).shape == (2, 32, 48, 3)
