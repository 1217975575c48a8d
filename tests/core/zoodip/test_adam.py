"""Adam, against torch's own in float64."""

import pytest
import torch
from blockskip_pack.blockskip_core.zoodip.adam import Adam


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_it_moves_a_row_as_torch_does(epsilon):
    gradients = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer, ours, adam = (
        torch.optim.Adam([theirs], lr=0.1, eps=epsilon),
        torch.ones(6).double(),
        Adam(6, epsilon, torch.float64),
    )
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
        ours = ours - 0.1 * adam.direction(gradient)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def test_it_continues_from_a_state():
    whole, first, second = Adam(3, 1e-8), Adam(3, 1e-8), Adam(3, 1e-8)
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    expected = [whole.direction(gradient) for gradient in gradients]
    for gradient in gradients[:4]:
        first.direction(gradient)
    second.restore(first.state(), 4)
    assert torch.equal(
        torch.stack([second.direction(gradient) for gradient in gradients[4:]]), torch.stack(expected[4:])
    )
