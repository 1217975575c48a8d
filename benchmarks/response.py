"""How well can a linear map predict what skipped last blocks add? One matrix against maps per noise band, held out.

    python dev.py benchmark response

On the demo's small world, without training: the draws of a run of the quality benchmark, with the last blocks skipped.
Every map is fitted on the same draws and checked on the same others, so errors can be compared: squared error on held-out
draws as a share of that of the mean, which is what a constant is. "Equal bytes" is the rank at which the bands' maps
together take as many numbers as the one matrix. Rows are lines of ``results/response.jsonl``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Iterable
from typing import Any

import command_line
import torch
from quality_arms import Arm
from quality_world import Bench, Settings
from torch import Tensor

logger = logging.getLogger("response")
FILE = "response.jsonl"
RIDGE = 0.01  # for every map; there are enough tokens here
SPANS = ((0, 6), (4, 2))  # first and last blocks skipped of 12: measured on this world, and the paper's scaled
Pairs = list[tuple[Tensor, Tensor]]


def pairs_of(bench: Bench, subject: str, spans: tuple[int, int], settings: Settings) -> tuple[list[float], Pairs]:
    """Return the noise level of every draw, and the tokens that enter the last blocks with what these add."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
    from blockskip_pack.blockskip_core.selection.selection import BlockSelection
    from quality import draw
    from quality_sources import PRECOMPUTE_BATCH

    photos, captions = bench.training_set(subject, settings)
    schedule = draw(bench, Arm("patches", ""), len(photos), 0, settings)
    latents = bench.encoded(subject, photos, schedule)
    selection = BlockSelection(front=spans[0], back=spans[1], num_blocks=bench.num_blocks, family="flux")
    dit = HostedDit(bench.model, captions, latents.shape[1:])
    computed = precompute_residuals(
        dit, schedule, latents, selection, range(len(schedule)), batch_size=PRECOMPUTE_BATCH, keep_entering=True
    )
    residuals = computed.residuals
    return [d.sigma for d in schedule], [(computed.entering[i], residuals[i].back) for i in range(len(schedule))]


def errors(sigmas: list[float], pairs: Pairs) -> dict[str, tuple[int, float]]:
    """Return (numbers, held-out error) of every kind of map; a band's error is weighted by its variance."""
    from blockskip_pack.blockskip_core.residuals.back_response import RANK, noise_bands
    from blockskip_pack.blockskip_core.residuals.low_rank_regression import (
        diagonal_low_rank_regression,
        ridge_regression,
    )

    bands = noise_bands(sigmas)
    width = pairs[0][0].shape[-1]
    fitted = [[pairs[i] for i in band.fitted] for band in bands]
    held_out = [[pairs[i] for i in band.held_out] for band in bands]
    whole, moments = _moments(sum(fitted, [])), [_moments(part) for part in fitted]
    constant = sum(_error(None, own, part) for own, part in zip(moments, held_out, strict=True))
    found: dict[str, tuple[int, float]] = {}

    def add(name: str, numbers: int, maps: list[Any], intercepts: list[Any]) -> None:
        parts = zip(maps, intercepts, held_out, strict=True)
        found[name] = numbers, sum(_error(one, means, part) for one, means, part in parts) / constant

    matrix = ridge_regression(whole, RIDGE)
    add("one matrix, a mean for all", width**2, [matrix] * len(bands), [whole] * len(bands))
    add("one matrix, a mean per band", width**2, [matrix] * len(bands), moments)
    add("a matrix per band", len(bands) * width**2, [ridge_regression(own, RIDGE) for own in moments], moments)
    equal = (width // len(bands) - 1) // 2
    for rank in sorted({4, 8, equal, min(RANK, width)}):
        maps = [_dense(diagonal_low_rank_regression(own, rank, RIDGE)) for own in moments]
        name = f"diagonal and rank {rank} per band" + ", equal bytes" * (rank == equal)
        add(name, len(bands) * (2 * rank + 1) * width, maps, moments)
    return found


def _moments(pairs: Pairs) -> Any:
    from blockskip_pack.blockskip_core.residuals.low_rank_regression import Moments

    moments = Moments(*pairs[0])
    for h, d in pairs:
        moments.add(h, d)
    return moments


def _dense(found: Any) -> Tensor:
    return torch.diag(found.diagonal) + found.down @ found.up


def _error(matrix: Tensor | None, moments: Any, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the squared error of a map with an intercept, or of the mean."""
    mean_h, mean_d = moments.means
    left = [(d.double() - mean_d, h.double() - mean_h) for h, d in pairs]
    return sum((d if matrix is None else d - h @ matrix).square().sum().item() for d, h in left)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the mean error of every map over the subjects, by span."""
    lines = ["| skipped, first + last | map | numbers | held-out error |", "|---|---|---|---|"]
    for spans in SPANS:
        own = [row for row in rows if row["spans"] == list(spans)]
        for name in own[0]["errors"] if own else ():
            values = [row["errors"][name][1] for row in own]
            span = f"{min(values):.3f} to {max(values):.3f}"
            numbers = own[0]["errors"][name][0]
            lines.append(
                f"| {spans[0]} + {spans[1]} | {name} | {numbers:,} | {statistics.fmean(values):.3f} ({span}) |"
            )
    return lines


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows and table go")
    parser.add_argument("--subjects", nargs="+", default=["toby", "mila", "pip", "zuzu", "nori"])
    parser.add_argument("--draws", type=int, default=200)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure what is missing, then write the table."""
    options = parse()
    command_line.begin(options, logger)
    import host

    file, settings = options.results / FILE, Settings(draws=options.draws)
    done = command_line.rows_in(file)
    known = [(row["subject"], tuple(row["spans"]), row["draws"]) for row in done]
    bench = None if options.report else Bench(host.ASSETS, options.results)
    for subject in options.subjects if bench else ():
        for spans in SPANS:
            if (subject, spans, options.draws) in known:
                continue
            found = errors(*pairs_of(bench, subject, spans, settings))
            row = {"subject": subject, "spans": list(spans), "draws": options.draws, "errors": found}
            command_line.add_row(file, row)
            done.append(row)
            logger.info("%s, %s: %s", subject, spans, found)
    text = ["# Linear answers of skipped last blocks, held out", "", command_line.about(), "", *table(done), ""]
    (options.results / "response.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
