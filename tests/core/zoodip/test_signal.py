"""The check of the perturbation: which one follows a loss that is only known in jumps."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import TrainingError
from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule
from blockskip_pack.blockskip_core.zoodip.signal import LEAST, PAIRS, agreements, measure_signal

EXAMPLES = ExampleSchedule(0, 2, lowest=0.0, highest=1.0).spread(PAIRS)


def slope_loss(jump=0.0, noise=0.0):
    """A loss that is linear in the word, rounded to multiples of ``jump``, with noise."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.linspace(-1.0, 1.0, 32)

    def losses(words, example):
        exact = 1.0 + (words @ gradient).double() * (1.0 + example.level)
        if jump:
            exact = (exact / jump).round() * jump
        return exact + noise * torch.randn(len(words), generator=generator)

    return losses


def measure(losses, perturbation=0.2):
    return measure_signal(losses, torch.zeros(32), torch.full((32,), 0.5), perturbation, EXAMPLES, seed=1)


def test_agreement_is_the_mean_correlation_with_the_others():
    slopes = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = torch.corrcoef(slopes)
    expected = torch.stack([(r[i].sum() - 1.0) / 2 for i in range(3)])
    torch.testing.assert_close(agreements(slopes), expected)


def test_a_row_that_never_changes_agrees_with_nothing():
    slopes = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes[0] = 0.0
    assert agreements(slopes)[0] == 0.0


def test_an_exact_loss_keeps_the_perturbation_asked_for():
    found = measure(slope_loss())
    assert found.perturbation == 0.2
    assert min(found.agreement.values()) > 0.999
    assert found.passes == 6 * PAIRS


def test_where_the_loss_jumps_a_larger_perturbation_is_chosen():
    found = measure(slope_loss(jump=0.8), perturbation=0.1)
    assert found.perturbation == 0.2
    assert found.agreement[0.05] < found.agreement[0.1] < 0.9


@pytest.mark.parametrize("losses", [slope_loss(noise=100.0), slope_loss(jump=1e6)])
def test_a_loss_that_does_not_follow_the_word_is_refused(losses):
    with pytest.raises(TrainingError, match=f"at least {LEAST:g} is needed"):
        measure(losses)


def test_a_loss_that_is_not_finite_is_refused_as_such():
    with pytest.raises(TrainingError, match="The loss before the first step is not finite"):
        measure(lambda words, example: torch.full((len(words),), float("nan")))


def test_it_reports_progress():
    seen = []
    measure_signal(slope_loss(), torch.zeros(32), torch.ones(32), 0.1, EXAMPLES, 1, lambda *done: seen.append(done))
    assert seen == [(number + 1, PAIRS) for number in range(PAIRS)]
