"""Coarse patches: round trips, FlexiViT's closed form, projections, and the noise that is left."""

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_noise import matched_noise
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing, enlarging_matrix
from blockskip_pack.blockskip_core.errors import InvalidInputError

SIZES = [(p, s, kind) for p in (1, 2, 3) for s in (2, 4) for kind in ("nearest", "bilinear")]
each_size = pytest.mark.parametrize(("patch", "scale", "kind"), SIZES)


def latent(rows=24, columns=48, channels=3, batch=2):
    return torch.randn(batch, channels, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each_size
def test_unfolding_is_the_inverse_of_folding(patch, scale, kind):
    resizing, x = PatchResizing(patch, scale, kind), latent()
    tokens = resizing.tokens(x)
    assert tokens.shape == (2, 24 * 48 // resizing.side**2, 3 * resizing.side**2)
    assert torch.equal(resizing.latent(tokens, 48), x)


def test_tokens_are_in_raster_order_and_hold_their_own_cells():
    resizing, x = PatchResizing(2, 2), latent(8, 12)
    for number, token in enumerate(resizing.tokens(x).unbind(1)):
        row, column = divmod(number, 3)
        assert torch.equal(token.reshape(2, 3, 4, 4), x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


def test_a_clip_is_cut_frame_by_frame():
    """Frames are among the channels, channel by channel; tokens are those of the first frame, then of the second one."""
    resizing, x = PatchResizing(2, 2), latent(8, 12, channels=6)
    of_clips = resizing.of_clips(3)
    tokens = of_clips.tokens(x)
    frames = x.unflatten(1, (2, 3)).unbind(2)
    assert torch.equal(tokens, torch.cat([resizing.tokens(frame) for frame in frames], 1))
    assert torch.equal(of_clips.latent(tokens, 12), x)
    for single, several in zip(resizing.places(8, 12), of_clips.places(8, 12), strict=True):
        assert torch.equal(several, torch.cat([single] * 3, 1))


@each_size
def test_embedding_an_enlarged_patch_with_the_new_weight_is_embedding_the_patch(patch, scale, kind):
    """FlexiViT's condition: <B x, w'> = <x, w>; and w' is the one of least norm."""
    resizing, generator = PatchResizing(patch, scale, kind), torch.Generator().manual_seed(2)
    weight = torch.randn(5, 3, patch, patch, dtype=torch.float64, generator=generator)
    new = resizing.embedding_weight(weight)
    small = latent(patch, patch)
    torch.testing.assert_close(
        torch.einsum("bcij,dcij->bd", resizing.enlarged(small), new), torch.einsum("bcij,dcij->bd", small, weight)
    )
    up = enlarging_matrix(patch, resizing.side, kind)
    closed = up @ torch.linalg.inv(up.T @ up)
    torch.testing.assert_close(new, torch.einsum("ip,dcpq,jq->dcij", closed, weight, closed))
    torch.testing.assert_close(resizing.carried(new), new)  # nothing outside the span of B: least norm


@each_size
def test_reducing_and_the_models_own_weight_are_the_new_weight(patch, scale, kind):
    resizing, x = PatchResizing(patch, scale, kind), latent()
    weight = torch.randn(5, 3, patch, patch, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(
        conv(resizing.reduced(x), weight, stride=patch),
        conv(x, resizing.embedding_weight(weight), stride=resizing.side),
    )


@each_size
def test_what_tokens_carry_is_an_orthogonal_projection(patch, scale, kind):
    resizing, x, y = PatchResizing(patch, scale, kind), latent(), latent().flip(0)
    carried = resizing.carried(x)
    torch.testing.assert_close(resizing.carried(carried), carried)
    torch.testing.assert_close((carried * y).sum(), (x * resizing.carried(y)).sum())
    torch.testing.assert_close(resizing.carried(torch.ones_like(x)), torch.ones_like(x))


def test_copied_values_are_averaged_again():
    x = latent()
    torch.testing.assert_close(PatchResizing(2, 2).reduced(x), torch.nn.functional.avg_pool2d(x, 2))


@each_size
def test_the_share_of_noise_that_is_left(patch, scale, kind):
    resizing = PatchResizing(patch, scale, kind)
    side = resizing.side
    cells = torch.eye(side * side, dtype=torch.float64).reshape(-1, 1, side, side)
    variance = resizing.reduced(cells).square().sum(0).mean()  # exact: the sum over all unit impulses
    assert resizing.noise_share == pytest.approx(variance.sqrt().item())
    if kind == "nearest":
        assert resizing.noise_share == pytest.approx(1 / scale)


def test_a_reduced_latent_is_one_of_the_matched_level():
    """r ((1 - t) clean + t g noise) = (1 - m) clean + m noise."""
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    ratio, matched = matched_noise(sigma, 0.65)
    torch.testing.assert_close(ratio * (1 - sigma), 1 - matched)
    torch.testing.assert_close(ratio * sigma * 0.65, matched)
    assert matched[0] == 0.0
    assert matched[-1] == 1.0


def test_places_are_the_means_of_the_members():
    rows, columns = PatchResizing(2, 2).places(8, 12)
    assert rows.tolist() == [[0.5] * 3 + [2.5] * 3]
    assert columns.tolist() == [[0.5, 2.5, 4.5] * 2]
    assert PatchResizing(1, 4).places(4, 8)[1].tolist() == [[1.5, 5.5]]


def test_what_is_refused():
    with pytest.raises(InvalidInputError, match="at least 1 cell and a scale of at least 2"):
        PatchResizing(2, 1)
    with pytest.raises(InvalidInputError, match="nearest or bilinear"):
        PatchResizing(2, 2, "cubic")
    with pytest.raises(InvalidInputError, match="multiples of 4, got 6 x 8"):
        PatchResizing(2, 2).require_fitting(6, 8)
