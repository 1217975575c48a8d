"""The optimisers, compared with their formulas and with each other."""

import sys
from math import sqrt

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.optimizers import build_optimizer, require_optimizer, step_size
from torch import nn

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection, train

EIGHT_BIT = "AdamW 8-bit (bitsandbytes)"
PRODIGY = "Prodigy (prodigyopt)"
RATE, DECAY = 1e-2, 0.1


def stepped(name, steps=4, shape=(64, 128)):
    """A parameter after some steps on the sum of its squares, and its optimiser."""
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    optimizer = build_optimizer(name, [parameter], learning_rate=RATE, weight_decay=DECAY)
    for _ in range(steps):
        parameter.grad = 2 * parameter.detach()
        optimizer.step()
    return parameter.detach(), optimizer


def test_adamw_is_the_published_formula():
    """arXiv 1711.05101, Algorithm 2, written out."""
    p = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 5):
        g = 2 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p * (1 - RATE * DECAY)
        p = p - RATE * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(stepped("AdamW")[0].double(), p, atol=1e-6, rtol=0)


def test_eight_bit_moments_take_a_quarter_and_give_nearly_the_same_steps():
    pytest.importorskip("bitsandbytes")
    plain, full = stepped("AdamW")
    small, eight = stepped(EIGHT_BIT)
    assert (small - plain).abs().max() < 0.2 * 4 * RATE

    def moments(optimizer, keys):
        (state,) = optimizer.state.values()
        return sum(state[key].nbytes for key in keys)

    wide = moments(full, ("exp_avg", "exp_avg_sq"))
    assert moments(eight, ("state1", "state2")) == wide / 4
    assert moments(eight, ("state1", "state2", "absmax1", "absmax2")) < 0.27 * wide


def test_adafactor_is_the_published_formula_with_absolute_steps():
    """arXiv 1804.04235, Algorithm 4, with RATE in the place of alpha, and decoupled weight decay; in float64."""
    p = torch.randn(64, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter = nn.Parameter(p.clone())
    optimizer = build_optimizer("Adafactor", [parameter], learning_rate=RATE, weight_decay=DECAY)
    rows, columns = torch.zeros(64, 1).double(), torch.zeros(1, 128).double()
    for step in range(1, 5):
        parameter.grad = 2 * parameter.detach()
        optimizer.step()
        g, beta = 2 * p, 1 - step**-0.8
        square = g * g + 1e-30
        rows = beta * rows + (1 - beta) * square.sum(1, keepdim=True)
        columns = beta * columns + (1 - beta) * square.sum(0, keepdim=True)
        u = g / (rows * columns / rows.sum()).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        p = p * (1 - RATE * DECAY) - RATE * u
    torch.testing.assert_close(parameter.detach(), p, atol=1e-12, rtol=0)
    (state,) = optimizer.state.values()
    assert sum(x.numel() for x in state.values() if isinstance(x, torch.Tensor)) == 64 + 128 + 1  # and the size of p


def test_prodigy_is_the_published_formula_and_its_step_size_grows(capsys):
    """arXiv 2306.06101, Algorithm 4, with Adam's bias correction and no rate in the sum of gradients; in float64.

    Two parameters share one d. d_hat = sum of weighted (g, x0 - x) / |sum of weighted g|_1, weights d^2 / d0.
    """
    pytest.importorskip("prodigyopt")
    x = [torch.randn(64, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(2)]
    parameters = [nn.Parameter(part.clone()) for part in x]
    optimizer = build_optimizer(PRODIGY, parameters, learning_rate=0.5, weight_decay=DECAY)
    x = torch.cat(x)
    first, (m, v, s), above, d = x.clone(), torch.zeros(3, 128).double(), 0.0, 1e-6
    for k in range(1, 121):
        assert step_size(optimizer) == pytest.approx(0.5 * d, rel=1e-12)
        for part in parameters:
            part.grad = 2 * part.detach()
        optimizer.step()
        g, step = 2 * x, 0.5 * d * sqrt(1 - 0.999**k) / (1 - 0.9**k)
        above = sqrt(0.999) * above + d / 1e-6 * step * (g @ (first - x)).item()
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d * d * g * g
        s = sqrt(0.999) * s + d / 1e-6 * d * g
        d = max(d, above / s.abs().sum().item())
        x = x * (1 - step * DECAY) - step * m / (v.sqrt() + d * 1e-8)
    torch.testing.assert_close(torch.cat(parameters).detach(), x, atol=0, rtol=1e-9)
    assert d > 1e-4
    assert capsys.readouterr().out == ""


def test_prodigy_refuses_another_optimizers_rate():
    with pytest.raises(InvalidInputError, match="at least 0.1 with Prodigy.*; 1 is usual. Got 0.0001."):
        TrainingConfig(steps=1, optimizer=PRODIGY, learning_rate=1e-4)


@pytest.mark.parametrize("name", [EIGHT_BIT, "Adafactor", PRODIGY])
def test_a_run_learns_with_other_optimizers(name):
    if "(" in name:
        pytest.importorskip(name.split("(")[1].rstrip(")"))
    settings = {"steps": 90, "learning_rate": 1.0} if name == PRODIGY else {"steps": 30}  # from a step size of 1e-6
    dit, chosen, plan = PlainDit(dtype=torch.float32), selection(1, 1), schedule()
    clean = latents(dtype=torch.float32)
    adapters = lora_for(dit, chosen, dtype=torch.float32)
    source = MemorySource(dit, chosen, plan, clean)
    result, _ = train(dit, chosen, source, adapters, plan=plan, clean=clean, batch_size=4, optimizer=name, **settings)
    assert result.losses[-1] < 0.9 * result.losses[0]


@pytest.mark.parametrize(
    ("name", "package", "module"),
    [
        (EIGHT_BIT, "bitsandbytes", "optim"),
        ("Adafactor", "transformers", "optimization"),
        (PRODIGY, "prodigyopt", "prodigy"),
    ],
)
def test_without_the_extra_package_a_run_says_what_to_do(monkeypatch, name, package, module):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.{module}", None)
    with pytest.raises(InvalidInputError, match=rf"pip install {package}.*or choose AdamW"):
        stepped(name, steps=0)
    with pytest.raises(InvalidInputError, match=rf"pip install {package}.*or choose AdamW"):
        require_optimizer(name)  # when the graph is queued


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InvalidInputError, match="optimizer must be one of AdamW, .*, got 'Lion'"):
        TrainingConfig(steps=1, optimizer="Lion")
