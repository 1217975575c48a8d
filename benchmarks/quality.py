"""Does it learn the subject? The paper's ablations, on the demo world, on a CPU.

    python dev.py benchmark quality            # all arms, subjects and seeds; resumes a stopped run
    python dev.py benchmark quality -- --report   # only rewrite the table and the plot

Every cell (arm, subject, seed) is one line of ``benchmarks/results/quality_cells.jsonl``, so a run can be stopped at
any time, and several runs can work side by side (``--share 1/2`` and ``--share 2/2``).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command_line
import quality_report
import quality_sheet
import torch
from quality_arms import ARMS, BASELINE, FULL, SMALL, Arm, arm_named
from quality_world import Bench, Settings

logger = logging.getLogger("quality")
SEEDS = (0, 1, 2)
PROBE_CAPTIONS = 4


def train(bench: Bench, arm: Arm, subject: str, seed: int, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Train one LoRA; return the MODEL with it, and the costs of the training."""
    from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_host_lora
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora
    from blockskip_pack.blockskip_core.hosts.inputs.empty_captions import with_empty_captions
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
    from blockskip_pack.blockskip_core.hosts.models.quantised_blocks import QuantisedDit
    from blockskip_pack.blockskip_core.training.config import TrainingConfig
    from blockskip_pack.blockskip_core.training.loop import train_lora
    from blockskip_pack.blockskip_core.training.quantisation_offsets import QuantisationOffsets
    from blockskip_pack.blockskip_core.training.result import TrainingResult
    from quality_sources import source_for

    photos, captions = bench.training_set(subject, settings)
    schedule = draw(bench, arm, len(photos), seed, settings)
    latents = bench.encoded(subject, photos, schedule)
    captions, schedule, _ = with_empty_captions(
        captions, schedule, bench.conditioning(""), arm.changes.get("caption_dropout", 0.0)
    )
    dit = HostedDit(bench.model, captions, latents.shape[1:])
    selection = choose(bench, arm, subject, settings)
    config = TrainingConfig(
        steps=round(settings.steps * arm.changes.get("steps", 1)),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate * arm.changes.get("learning_rate", 1),
        lr_schedule=settings.lr_schedule,
        seed=seed,
        checkpointing=False,
        ema=arm.changes.get("ema", 0.0),
    )
    layers = dit.lora_layers(selection, "attention and mlp")
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    rank = round(settings.rank * arm.changes.get("rank", 1))
    adapters = LoraAdapters(shapes, LoraSettings(rank=rank, alpha=rank), seed=seed)

    def with_lora() -> Any:
        state = {f"{n}.lora_{part}.weight": get(n).detach() for n in adapters.names
                 for part, get in (("A", adapters.down), ("B", adapters.up))}  # fmt: skip
        return apply_lora(bench.model, to_host_lora(state, adapters.scale), 1.0)[0]

    def current() -> HostedDit:
        return HostedDit(with_lora(), captions, latents.shape[1:])

    parts = {"dit": dit, "schedule": schedule, "latents": latents, "selection": selection}
    source = source_for(arm.stand_in, current, round(arm.changes.get("refreshes", 0)), **parts)
    result, started = TrainingResult(), time.perf_counter()
    trained: Any = dit
    _, _, frozen = arm.stand_in.partition("exact, ")
    formats = {dit.blocks[index].name: frozen for index in selection.frozen_span if frozen}
    formats |= {dit.blocks[index].name: arm.trained_in for index in selection.adapted if arm.trained_in}
    if formats:  # the residuals stay those of the model as loaded, as in the nodes
        trained = QuantisedDit(dit, formats)
    offsets = QuantisationOffsets(dit) if arm.changes.get("corrected") else None
    train_lora(trained, schedule, latents, selection, source, adapters, config, result=result, offsets=offsets)
    seconds = time.perf_counter() - started
    kept = list(trained.blocks) if arm.stand_in == "on the fly" else [trained.blocks[i] for i in selection.kept]
    return with_lora(), {
        "front": selection.front,
        "back": selection.back,
        "tail": selection.tail,
        "frozen": selection.frozen,
        "loss": statistics.fmean(result.losses[-50:]),
        "saved_bytes": result.saved_bytes,
        "block_bytes": sum(block.num_bytes for block in kept),
        "step_seconds": statistics.median(result.step_seconds),
        "seconds": seconds,
    }


def draw(bench: Bench, arm: Arm, pictures: int, seed: int, settings: Settings) -> Any:
    """Return the arm's training schedule."""
    from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig
    from blockskip_pack.blockskip_core.data.schedule import draw_schedule
    from blockskip_pack.blockskip_core.data.timesteps import sigma_sampler

    order = {"full": "fixed", "resize": "fixed"}.get(arm.views, arm.views)
    smallest = FULL if arm.views == "full" else SMALL
    sampling = bench.model.get_model_object("model_sampling")
    return draw_schedule(
        [(FULL, FULL)] * pictures,
        num_captions=pictures,
        num_draws=round(settings.draws * arm.changes.get("draws", 1)),
        patches=PatchConfig(patch_min=smallest, patch_max=FULL, multiple=16, order=order),
        sample_sigmas=sigma_sampler(
            "model", model_sigma=lambda t: float(sampling.percent_to_sigma(1.0 - t)), shift=1.0
        ),
        seed=seed,
    )


def choose(bench: Bench, arm: Arm, subject: str, settings: Settings) -> Any:
    """Return the arm's block selection."""
    selection = _chosen(bench, arm, subject, settings)
    return selection.with_exact_back() if arm.stand_in.startswith("exact") else selection


def _chosen(bench: Bench, arm: Arm, subject: str, settings: Settings) -> Any:
    """Return the blocks that the arm skips or, with an exact back, freezes."""
    from blockskip_pack.blockskip_core.selection.cost_and_influence import affordable_selection
    from blockskip_pack.blockskip_core.selection.presets import preset_selection
    from blockskip_pack.blockskip_core.selection.selection import BlockSelection, num_skipped

    blocks = bench.num_blocks
    count = num_skipped(arm.ratio, blocks)
    if arm.choice == "preset":
        return preset_selection(arm.ratio, blocks, "flux")
    if arm.choice in ("front, by bytes", "cost and influence"):
        known = None if arm.choice == "front, by bytes" else influence(bench, blocks, None, settings)
        return affordable_selection(arm.ratio, "flux", bench.block_bytes, known)
    spans = {"none": (0, 0), "first only": (count, 0), "last only": (0, count), "by hand": arm.spans}
    if arm.choice in spans:
        front, back = spans[arm.choice]
    else:
        about = subject if arm.choice == "measured on a trained model" else None
        front, back = influence(bench, blocks, about, settings).select(count)
    tail = int(arm.choice == "measured, before the last block")
    return BlockSelection(front=front, back=back, tail=tail, num_blocks=blocks, family="flux")


def influence(bench: Bench, num_blocks: int, subject: str | None, settings: Settings) -> Any:
    """Return the effect of masking the text in each run of blocks (Eq. 2), measured once in the reader's features.

    If a subject is given, it is measured on the model with a LoRA on all blocks trained on that subject, and with its
    captions. The paper measures on fine-tuned models (Fig. 3).
    """
    from blockskip_pack.blockskip_core.selection.text_influence import TextInfluence, measure

    file = bench.results / f"quality_influence_{bench.identity}{'_' + subject if subject else ''}.json"
    if file.is_file():
        return TextInfluence.from_json(file.read_text(encoding="utf-8"))
    import random

    rng = random.Random(0)
    model = bench.model
    scenes = [bench.world.random_scene(rng) for _ in range(PROBE_CAPTIONS)]
    if subject:
        model, _ = train(bench, arm_named(BASELINE), subject, 0, settings)
        scenes = bench.held_out(subject, PROBE_CAPTIONS)
    texts = [bench.world.caption(scene) for scene in scenes]
    measured = TextInfluence(num_blocks, "reader's features", num_pictures=len(texts))
    measure(measured, ReadPictures(bench, model, texts), num_blocks // 2)
    file.write_text(measured.to_json(), encoding="utf-8")
    return measured


class ReadPictures:
    """Probe pictures of some captions, each with its own noise, in the reader's features."""

    def __init__(self, bench: Bench, model: Any, texts: list[str]) -> None:
        from blockskip_pack.blockskip_core.hosts.sampling.probe_pictures import MaskedSampler, ProbeConfig

        probe = ProbeConfig(size=SMALL, steps=12, cfg=3.0)
        self._bench, self._texts, self._sampler = bench, texts, MaskedSampler(model, probe)
        self.steps = probe.steps * len(texts)

    @torch.no_grad()
    def embeddings(self, masked: frozenset[int], on_step: Callable[[], None]) -> list[torch.Tensor]:
        """Sample every picture and return the reader's features."""
        bench = self._bench
        pictures = [
            bench.vae.decode(
                self._sampler.sample(
                    bench.conditioning(text), bench.conditioning(""), seed=i, masked=masked, on_step=on_step
                )
            )
            for i, text in enumerate(self._texts)
        ]
        return [bench.reader.features(picture.permute(0, 3, 1, 2).clamp(0, 1)) for picture in pictures]


@torch.no_grad()
def cell(bench: Bench, name: str, subject: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train and evaluate one cell; "base" is the untrained model, evaluated in the same way."""
    model, costs = bench.model, {}
    if name != "base":
        model, costs = train(bench, arm_named(name), subject, seed, settings)
    found = dict(costs)
    for size, suffix in ((FULL, ""), (SMALL, "_small")):
        found["held_out_loss" + suffix] = bench.held_out_loss(model, subject, size, settings)
        fidelity, pictures, drawn = bench.fidelity(model, subject, seed, size, settings)
        found |= {measure + suffix: value for measure, value in fidelity.items()}
        for who, seen in ((name, pictures), (quality_sheet.DRAWN, drawn)):
            for prompt, picture in enumerate(seen):
                keep(picture, quality_sheet.file_of(bench.results, who, subject, seed, prompt, small=size == SMALL))
    return found


def keep(picture: torch.Tensor, file: Path) -> None:
    """Write a sample for the sheet."""
    from sample_world import to_picture

    file.parent.mkdir(parents=True, exist_ok=True)
    to_picture(picture).save(file, quality=92)


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield our share of all (arm, subject, seed), by seed first, so that an early stop leaves complete comparisons."""
    part, parts = options.share
    every = [(arm, subject, seed) for seed in options.seeds for subject in options.subjects for arm in options.arms]
    pairs = sorted({(seed, subject) for _, subject, seed in every}, key=[(s, x) for _, x, s in every].index)
    for arm, subject, seed in every:
        if pairs.index((seed, subject)) % parts == part - 1:
            yield arm, subject, seed


def run(bench: Bench, options: argparse.Namespace, settings: Settings) -> None:
    """Run the cells that are not done; arms with identical trainings share one."""
    file = bench.results / f"quality_cells{'' if options.share[1] == 1 else '_' + str(options.share[0])}.jsonl"
    key = key_of(bench, settings)
    done = {
        (row["arm"], row["subject"], row["seed"]): row
        for row in quality_report.rows(bench.results)
        if row["key"] == key
    }
    for name, subject, seed in cells(options):
        if (name, subject, seed) in done:
            continue
        twin = twin_of(bench, name, subject, settings, [arm for arm, *cell in done if cell == [subject, seed]])
        found = done[twin, subject, seed] if twin else cell(bench, name, subject, seed, settings)
        row = {**found, "key": key, "arm": name, "subject": subject, "seed": seed}
        row = {field: round(value, 6) if isinstance(value, float) else value for field, value in row.items()}
        done[name, subject, seed] = row
        command_line.add_row(file, row)
        logger.info("%s, %s, seed %d: loss %.4f, cosine %.3f", name, subject, seed, row["held_out_loss"], row["cosine"])


def key_of(bench: Bench, settings: Settings) -> str:
    """Return the hash of what comparable cells must share: the world's weights and all settings."""
    parts = [bench.identity, dataclasses.asdict(settings)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


def twin_of(bench: Bench, name: str, subject: str, settings: Settings, others: list[str]) -> str | None:
    """Return a finished arm whose training is identical because another method chose the same blocks, or None."""

    def training(arm: Arm) -> tuple:
        selection = choose(bench, arm, subject, settings)
        return arm.views, arm.stand_in, arm.trained_in, tuple(arm.changes.items()), selection

    if name == "base":
        return None
    return next(
        (other for other in others if other != "base" and training(arm_named(other)) == training(arm_named(name))), None
    )


def add_world_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which world, subjects, seeds and settings."""
    parser.add_argument("--assets", type=Path, help="the demo world's files, if not the shipped ones")
    parser.add_argument(
        "--dit",
        choices=("scenes", "views"),
        default="scenes",
        help="the world's transformer: scenes, or views, which carries from crops to pictures",
    )
    parser.add_argument("--subjects", nargs="+", default=["toby", "mila", "pip", "zuzu", "nori"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("SETTING", "VALUE"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where cells, table and plot go")
    add_world_arguments(parser)
    parser.add_argument("--arms", nargs="+", default=["base", BASELINE, *(a.name for a in ARMS if a.name != BASELINE)])
    parser.add_argument(
        "--share", default="1/1", help="1/2 and 2/2: two runs side by side, each with half of the cells"
    )
    options = parser.parse_args()
    options.share = tuple(map(int, options.share.split("/")))
    return options


def main() -> None:
    """Run the cells, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import host

    settings = Settings(**{name: json.loads(value) for name, value in options.set})
    bench = Bench(options.assets or host.ASSETS, options.results, options.dit)
    if not options.report:
        run(bench, options, settings)
    if options.share[1] == 1:
        about = command_line.about(host=False) + ("" if options.dit == "scenes" else f" With --dit {options.dit}.")
        quality_report.write(options.results, key_of(bench, settings), settings, about)


if __name__ == "__main__":
    main()
