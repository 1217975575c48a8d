"""Noise levels, and the error of the model's own output, for every kind of prediction."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def module(comfyui):
    from blockskip_pack.blockskip_core.hosts.words import noise_levels

    return noise_levels


def sampling(*bases):
    import comfy.model_sampling

    return type("Sampling", tuple(getattr(comfy.model_sampling, name) for name in bases), {})()


def targets(kind, sigma, clean, noise):
    """Return the output on which a model of a kind is trained; alpha^2 + s^2 = 1 with s / alpha = sigma."""
    alpha = (1.0 + sigma**2) ** -0.5
    return {"EPS": noise, "V_PREDICTION": alpha * noise - sigma * alpha * clean, "CONST": noise - clean, "X0": clean}[
        kind
    ]


@pytest.mark.parametrize(
    "bases",
    [("EPS", "ModelSamplingDiscrete"), ("V_PREDICTION", "ModelSamplingDiscrete"), ("CONST", "ModelSamplingDiscreteFlow"),
     ("X0", "ModelSamplingDiscrete")],
)  # fmt: skip
@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_it_is_the_error_of_what_the_model_predicts(module, bases, level):
    generator = torch.Generator().manual_seed(0)
    clean, noise, output = torch.randn(3, 1, 2, 4, 4, generator=generator, dtype=torch.float64)
    kind = sampling(*bases)
    sigma = torch.tensor([module.sigma_of(kind, level)], dtype=torch.float64)
    noisy = kind.noise_scaling(sigma, noise, clean)
    denoised = kind.calculate_denoised(sigma, output, noisy)
    expected = (output - targets(bases[0], sigma, clean, noise)).square().mean()
    found = module.output_error(kind, sigma, clean, denoised)
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=0.0)
    assert found.dtype == torch.float32


def test_a_perfect_estimate_has_no_error(module):
    clean = torch.randn(1, 2, 4, 4)
    kind = sampling("EPS", "ModelSamplingDiscrete")
    assert module.output_error(kind, torch.tensor([0.7]), clean, clean) == 0.0


def test_levels_of_discrete_models_are_shares_of_their_times(module):
    kind = sampling("EPS", "ModelSamplingDiscrete")
    assert module.sigma_of(kind, 0.0) == pytest.approx(float(kind.sigma_min))
    assert module.sigma_of(kind, 1.0) == pytest.approx(float(kind.sigma_max))
    assert module.sigma_of(kind, 500 / 999) == pytest.approx(float(kind.sigmas[500]), rel=1e-5)


def test_levels_of_flow_models_are_their_sigmas(module):
    kind = sampling("CONST", "ModelSamplingFlux")
    assert module.sigma_of(kind, 0.62) == 0.62
    assert module.sigma_of(kind, 0.0) == module.SMALLEST_SIGMA
    assert module.is_flow(kind)
    assert not module.is_flow(sampling("EPS", "ModelSamplingDiscrete"))


def test_levels_of_other_models_rise_from_end_to_end(module):
    kind = sampling("V_PREDICTION", "ModelSamplingContinuousEDM")
    found = [module.sigma_of(kind, level) for level in (0.0, 0.3, 0.6, 1.0)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(float(kind.sigma_min), rel=1e-3)
    assert found[-1] == pytest.approx(float(kind.sigma_max), rel=1e-3)
