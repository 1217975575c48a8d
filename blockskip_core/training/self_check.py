"""Checks before and in the first step: replayed and full model agree, and every kept block gets a gradient."""

from __future__ import annotations

import torch

from ..adapters.lora import LoraAdapters
from ..blocks.replay import Residual
from ..blocks.skipping_model import SkippingModel
from ..data.flow_matching import noisy_batch
from ..data.latents import Latents
from ..data.schedule import TrainingSchedule
from ..errors import TrainingError
from ..model import Denoiser, SkippableDit
from ..residuals.format import ResidualFormat
from ..residuals.source import OpenResiduals, Reference
from ..selection.selection import BlockSelection

_ROUNDING = 2e-2  # of tokens in 16 bits, with room for other kernels at other batch sizes
_EIGHT_BIT_TOLERANCE = 0.1  # relative to what the model removes; measured on the tests' models: below 0.03


def check_against_full_model(
    dit: SkippableDit,
    schedule: TrainingSchedule,
    latents: Latents,
    model: SkippingModel,
    denoise: Denoiser,
    residuals: OpenResiduals,
    reference: Reference,
) -> float:
    """Compare with the full model's recorded output, before the LoRA is attached: they must agree.

    Args:
        dit, schedule, latents: The model and its training examples.
        model: The model with its skipped blocks replaced.
        denoise: Its denoiser, while it is running.
        residuals: The residuals to replay.
        reference: The full model's output for one of the draws.

    Returns:
        The relative difference.

    Raises:
        TrainingError: If the difference is more than rounding can explain.
    """
    residual = residuals.residual
    assert residual is not None, "there is no reference where nothing is stored"
    noisy, _, sigmas = (x.to(dit.device) for x in noisy_batch(schedule, latents, [reference.draw]))
    with torch.no_grad():
        model.replay_stored(residual, [reference.draw])
        denoised = denoise(noisy, sigmas, [schedule[reference.draw].caption]).cpu()
    removed = (noisy.cpu() - reference.denoised).norm().clamp_min(1e-12)
    difference = ((denoised - reference.denoised).norm() / removed).item()
    tolerance = _tolerance(residual(reference.draw), residuals.form) + dit.known_error
    if not difference <= tolerance:
        raise TrainingError(
            f"Before the first step, the model with skipped blocks differs from the full model by "
            f"{difference:.2e} (at most {tolerance:.2e} was expected). Something may have changed the model "
            "since its residuals were computed; use the same model for both."
            + (" Or its weights are rounded too much; choose a finer format." if dit.known_error else "")
        )
    return difference


def require_explained(difference: float, known_error: float) -> None:
    """Require that a quantised model differs from the one as loaded by no more than its weights' error explains.

    Args:
        difference: Relative difference of their predictions, of all examples together.
        known_error: See :attr:`SkippableDit.known_error`.

    Raises:
        TrainingError: If it is more; also if it is not a number.
    """
    tolerance = known_error + _ROUNDING
    if not difference <= tolerance:
        raise TrainingError(
            f"Before the first step, the quantised model's predictions differ from those of the model as loaded by "
            f"{difference:.2e} (at most {tolerance:.2e} was expected). Quantisation harms this model too much; choose a finer "
            "format."
        )


def check_gradients(dit: SkippableDit, selection: BlockSelection, adapters: LoraAdapters) -> None:
    """Require a gradient in every kept block; B is zero at the start, so only its own gradient can be nonzero.

    Raises:
        TrainingError: If a kept block has no gradient.
    """
    for index in selection.adapted:
        block = dit.blocks[index].name + "."
        ups = [adapters.up(name) for name in adapters.names if name.startswith(block)]
        if ups and not any(up.grad is not None and up.grad.any() for up in ups):
            raise TrainingError(
                f"Block {block[:-1]} got no gradient in the first step. This is a bug in the adapter for "
                f"the {dit.family} family; please report it."
            )


def _tolerance(residual: Residual, form: ResidualFormat) -> float:
    """Return the tolerance for rounding of the stored tokens, with room for other kernels at other batch sizes."""
    if form != "exact":
        return _EIGHT_BIT_TOLERANCE
    dtype = next((tensor.dtype for tensor in residual.tensors().values()), None)
    exact = {torch.float64: 1e-6, torch.float32: 1e-4}
    return _ROUNDING if dtype is None else exact.get(dtype, _ROUNDING)
