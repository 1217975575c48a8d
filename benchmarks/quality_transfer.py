"""Does training on small crops transfer to full pictures? A LoRA on all blocks, trained on crops at 128 px.

    python quality_transfer.py --comfyui FOLDER [--subjects toby mila] [--captions plain full]

R at 256 px is the held-out gain of a LoRA trained on crops, as a share of that of a LoRA trained on full pictures. No
block is skipped, so R measures how much the world's model can transfer between sizes, and is the most that any arm of
the quality benchmark with crops can be expected to reach. ``plain`` captions omit size and place, which a crop changes.
Every finished pair is a line of ``results/quality_transfer.jsonl``; lines for other weights or settings are left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
from typing import Any

import command_line
import quality
import torch
from quality_arms import BASELINE, FULL, SMALL, arm_named
from quality_world import Bench, Settings

logger = logging.getLogger("quality_transfer")
CROPS = "patches, low to high"
BAR = 0.7
FILE = "quality_transfer.jsonl"


class PlainBench(Bench):
    """A bench whose captions contain neither size nor place."""

    def _captioned(self, scene: Any) -> list:
        return self.conditioning(self.world.caption(scene, sized=False, placed=False))


@torch.no_grad()  # like every cell of the quality benchmark; the training loop enables gradients itself
def pair(bench: Bench, subject: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Held-out losses at both sizes: without a LoRA, with one trained on full pictures, with one trained on crops."""
    models = {"base": bench.model}
    for name, arm in (("full", BASELINE), ("crops", CROPS)):
        models[name], _ = quality.train(bench, arm_named(arm), subject, seed, settings)
    sizes = {str(FULL): FULL, str(SMALL): SMALL}
    losses = {
        at: {name: bench.held_out_loss(model, subject, size, settings) for name, model in models.items()}
        for at, size in sizes.items()
    }
    return {"losses": losses, **{f"R_{at}": recovered(found) for at, found in losses.items()}}


def recovered(losses: dict[str, float]) -> float:
    """The crops' gain as a share of the full pictures'.

    Raises:
        ValueError: If full pictures gave no gain, so that there is nothing to recover.
    """
    gain = losses["base"] - losses["full"]
    if gain <= 0:
        raise ValueError(f"The LoRA on full pictures gained nothing ({gain:.4f}): train for more steps.")
    return (losses["base"] - losses["crops"]) / gain


def key_of(bench: Bench, captions: str, settings: Settings) -> str:
    """Return the key that lines must share to be comparable."""
    return json.dumps([bench.identity, captions, dataclasses.asdict(settings)])


def run(options: argparse.Namespace, settings: Settings) -> dict[str, float]:
    """Run the pairs that are not finished; return the mean R at full size by kind of captions."""
    import host

    file, means = options.results / FILE, {}
    for captions in options.captions:
        kind = PlainBench if captions == "plain" else Bench
        bench = kind(options.assets or host.ASSETS, options.results, options.dit)
        key = key_of(bench, captions, settings)
        found = {(row["subject"], row["seed"]): row for row in command_line.rows_in(file) if row["key"] == key}
        wanted = [(subject, seed) for seed in options.seeds for subject in options.subjects]
        for subject, seed in wanted:
            if (subject, seed) not in found and options.report:
                raise SystemExit(f"There is no line yet for {subject}, seed {seed}, {captions} captions: run it.")
            if (subject, seed) not in found:
                row = {"key": key, "captions": captions, "subject": subject, "seed": seed}
                found[subject, seed] = row | pair(bench, subject, seed, settings)
                command_line.add_row(file, found[subject, seed])
            row = found[subject, seed]
            logger.info("%s, seed %d, %s: R %.3f at %d px", subject, seed, captions, row[f"R_{FULL}"], FULL)
        means[captions] = statistics.fmean(found[one][f"R_{FULL}"] for one in wanted)
    return means


def main() -> None:
    """Run the pairs, log the means, and fail below the bar."""
    parser = command_line.parser(__doc__, "where the lines go")
    quality.add_world_arguments(parser)
    parser.set_defaults(subjects=["toby"], seeds=[0])
    parser.add_argument("--captions", nargs="+", choices=("plain", "full"), default=["plain"])
    options = parser.parse_args()
    command_line.begin(options, logger)
    means = run(options, Settings(**{name: json.loads(value) for name, value in options.set}))
    for captions, mean in means.items():
        logger.info("%s captions: R %.3f at %d px, from crops at %d px", captions, mean, FULL, SMALL)
    if max(means.values()) < BAR:
        raise SystemExit(f"Crops recover less than {BAR:.0%} of the gain.")


if __name__ == "__main__":
    main()
