"""How the skipped back span responds to a change of its input, to first order.

Difference from the paper: DiT-BlockSkip (arXiv 2603.20755, Sec. 3.3, Eq. 3) replays a constant that was measured on the
untrained weights, although the span's input changes as the LoRA learns, and lets the gradient pass as if the span were
not there. With h the image tokens that enter the span, d what it adds to them, and one map J per band of noise levels,

    stored     c = d(h) - J h
    replayed   h' -> h' + c + J h'  =  h' + d(h) + J (h' - h)

So the replay is still exact before anything is learned, a draw takes no more space than before, and the gradient passes
through I + J. J is a diagonal plus a low rank (``blocks.linear_response``), fitted by ridge regression over the tokens
of some draws (``low_rank_regression``). Every fifth of those draws is held out. They decide how strong the ridge is, and
in a band where J predicts them no better than the band's mean does, J is zero, which is the constant.

Axis legend: ``N`` image tokens, ``D`` width of a token, ``K`` bands, ``r`` rank. Maps act on rows: J h is ``h @ J``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor

from ..blocks.linear_response import LinearResponse
from .low_rank_regression import DiagonalLowRank, Moments, diagonal_low_rank_regression

BackResidual = Literal["constant", "linear", "exact"]
BACK_RESIDUALS: tuple[str, ...] = get_args(BackResidual)
RIDGES = (0.01, 0.1, 1.0)  # of the mean variance of h; the fewer tokens there are for the width, the more is needed
RANK = 64
MAX_BANDS = 4
MAX_DRAWS = 160  # that are fitted or held out
HELD_OUT = 5  # one draw in so many
_DRAWS_PER_BAND = 16  # at least, if there is more than one band

Pairs = Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor]]]
"""Draws -> (h, d) of each in that order, each of shape (..., N, D)."""


@dataclass(frozen=True)
class NoiseBand:
    """A range of noise levels, and the draws in it that are used for the fit.

    Attributes:
        top: Upper end of the range; infinite for the last one.
        fitted, held_out: Draws to fit on and to check with.
    """

    top: float
    fitted: tuple[int, ...]
    held_out: tuple[int, ...]


def noise_bands(sigmas: Sequence[float]) -> list[NoiseBand]:
    """Return bands with equally many draws each, ascending.

    Args:
        sigmas: Noise level of every draw of the schedule.
    """
    count = min(len(sigmas), MAX_DRAWS)
    used = [place * len(sigmas) // count for place in range(count)]
    used.sort(key=lambda draw: (sigmas[draw], draw))
    number = num_bands(len(sigmas))
    cuts = [band * count // number for band in range(number + 1)]
    bands = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = used[start:stop]
        held_out = part[HELD_OUT // 2 :: HELD_OUT]
        top = (sigmas[used[stop - 1]] + sigmas[used[stop]]) / 2 if stop < count else torch.inf
        bands.append(NoiseBand(top, tuple(draw for draw in part if draw not in held_out), tuple(held_out)))
    return bands


def num_bands(num_draws: int) -> int:
    """Return the number of bands for a schedule of so many draws."""
    return max(1, min(MAX_BANDS, min(num_draws, MAX_DRAWS) // _DRAWS_PER_BAND))


def how_fitted(num_draws: int) -> str:
    """Return everything that the fit depends on besides the residuals themselves, as text."""
    bands, used = num_bands(num_draws), min(num_draws, MAX_DRAWS)
    return f"linear, {bands} bands, rank {RANK}, ridge {RIDGES}, {used} draws, one in {HELD_OUT} held out"


def response_bytes(num_draws: int, width: int, itemsize: int) -> int:
    """Return the most bytes that the response of a schedule takes, once for all its draws."""
    bands = num_bands(num_draws)
    maps = bands * (2 * min(RANK, width) + 1) * width * itemsize
    return maps + (2 * bands - 1) * 8  # edges and errors in float64


def fit_bytes(width: int) -> int:
    """Return roughly the peak of host memory of fitting a band: square matrices in float64."""
    return 8 * width**2 * 8


def empty_response(num_draws: int, width: int, dtype: torch.dtype) -> LinearResponse:
    """Return a response of the size that a fit on a schedule has."""
    return LinearResponse.zeros(num_bands(num_draws), width, min(RANK, width), dtype)


@dataclass(frozen=True)
class FittedResponse:
    """A response, and how well it predicts draws that it was not fitted on.

    Attributes:
        errors: For each band the squared error on held-out draws, as a share of that of the band's mean; infinite if
            no draw could be held out. Shape (K,), float64.
        response: The maps; None if no band is better than a constant.
    """

    errors: Tensor
    response: LinearResponse | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names under which they are stored."""
        found = {} if self.response is None else self.response.tensors()
        return {"response.held_out": self.errors, **{f"response.{name}": tensor for name, tensor in found.items()}}

    @classmethod
    def found(cls, read: Callable[[str], Tensor | None]) -> FittedResponse | None:
        """Build it from stored tensors, or return None if none are stored.

        Args:
            read: Name as in :meth:`tensors` -> tensor, or None if there is none of that name.
        """
        names = ("held_out", "edges", "diagonal", "down", "up")
        named = {name: tensor for name in names if (tensor := read(f"response.{name}")) is not None}
        if "held_out" not in named:
            return None
        return cls(named["held_out"], LinearResponse.from_tensors(named) if "diagonal" in named else None)

    def describe(self) -> str:
        """Return the errors as one readable line."""
        bands = len(self.errors)
        return (
            f"linear back residual in {bands} band{'s' * (bands > 1)} of noise levels: error on held-out training "
            f"examples {', '.join(f'{error:.2f}' for error in self.errors.tolist())} of a constant's"
        )

    def problem(self) -> str:
        """Return what users should know, as a sentence: where a constant is used instead. Empty if nowhere."""
        constant = int((~(self.errors < 1.0)).sum())
        if not constant:
            return ""
        bands = len(self.errors)
        where = "" if constant == bands else f" in {constant} of {bands} bands of noise levels"
        return (
            f"The linear back residual predicts held-out training examples no better than a constant{where} (error "
            f"{', '.join(f'{error:.2f}' for error in self.errors.tolist())} of a constant's), so a constant is used "
            "there. More training examples, or `back_residual` exact, may help."
        )


def fit_response(
    sigmas: Sequence[float],
    pairs: Pairs,
    rank: int = RANK,
    ridges: Sequence[float] = RIDGES,
    before_each: Callable[[], None] = lambda: None,
) -> FittedResponse:
    """Fit the map of each band, and check it on draws that it has not seen.

    Args:
        sigmas: Noise level of every draw of the schedule.
        pairs: Provides tokens and what is added to them; called band by band, so that only one band's are needed.
        rank: r.
        ridges: Penalties to choose from, in units of the mean variance of h.
        before_each: Called before every regression, which may take seconds; may raise to interrupt.
    """
    bands = noise_bands(sigmas)
    fitted = [_fit_band(band, pairs, rank, ridges, before_each) for band in bands]
    errors = torch.tensor([error for _, error in fitted], dtype=torch.float64)
    maps = [one for one, _ in fitted if one is not None]
    if not maps or not (errors < 1.0).any():
        return FittedResponse(errors, None)
    edges = torch.tensor([band.top for band in bands[:-1]], dtype=torch.float64)
    chosen = [_zeros_like(maps[0]) if one is None or error >= 1.0 else one for one, error in fitted]
    parts = (torch.stack([getattr(one, part) for one in chosen]) for part in ("diagonal", "down", "up"))
    return FittedResponse(errors, LinearResponse(edges, *parts))


def _fit_band(
    band: NoiseBand, pairs: Pairs, rank: int, ridges: Sequence[float], before_each: Callable[[], None]
) -> tuple[DiagonalLowRank | None, float]:
    """Return a band's best map in the tokens' dtype, on the CPU, and its error on the band's held-out draws."""
    if not (band.fitted and band.held_out):
        return None, torch.inf
    # In one go, because a caller may compute many draws at a time.
    seen = iter(pairs((*band.fitted, *band.held_out)))
    h, d = next(seen)
    moments, dtype = Moments(h, d), h.dtype
    moments.add(h, d)
    for h, d in islice(seen, len(band.fitted) - 1):
        moments.add(h, d)
    held_out, best, least = list(seen), None, torch.inf
    for ridge in ridges:
        before_each()
        found = diagonal_low_rank_regression(moments, rank, ridge)
        stored = DiagonalLowRank(*(x.to(dtype) for x in (found.diagonal, found.down, found.up)))
        error = held_out_error(_in_float64(stored).added, moments, held_out)
        if error < least:
            best, least = stored, error
    return best, least


def held_out_error(
    added: Callable[[Tensor], Tensor], moments: Moments, pairs: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """Return a map's squared error on some pairs, as a share of the error of the mean; 1 if the mean is right.

    Args:
        added: The map, h -> J h, in float64 on the CPU.
        moments: Of the pairs that it was fitted on; their means are its intercept.
        pairs: (h, d) of other draws.
    """
    mean_h, mean_d = moments.means
    left = constant = 0.0
    for h, d in pairs:
        target = d.cpu().double() - mean_d
        left += (target - added(h.cpu().double() - mean_h)).square().sum().item()
        constant += target.square().sum().item()
    return left / constant if constant else 1.0


def constant_part(added: Tensor, entering: Tensor, response: LinearResponse, sigma: float) -> Tensor:
    """Return c = d - J h of a draw, shape (1, N, D), in the dtype of ``added``; rounds J h as the replay does."""
    wide = torch.promote_types(added.dtype, torch.float32)
    linear = response.added(entering, response.bands([sigma]))
    return (added.to(wide) - linear.to(wide)).to(added.dtype)


def _in_float64(found: DiagonalLowRank) -> DiagonalLowRank:
    return DiagonalLowRank(found.diagonal.double(), found.down.double(), found.up.double())


def _zeros_like(found: DiagonalLowRank) -> DiagonalLowRank:
    return DiagonalLowRank(*map(torch.zeros_like, (found.diagonal, found.down, found.up)))
