"""Can a word be learned from forward passes? Zeroth-order against gradient textual inversion on the demo's small world.

    python dev.py benchmark words                 # about four hours on one core of a busy machine
    python dev.py benchmark words -- --report     # only rewrite the table

Every arm gets the same number of forward passes, through the same code as the node: ``hosts/words``, ``zoodip``.
Gradient arms take a backward pass for each forward pass in addition, which is not counted. What is measured is the
held-out loss: pictures of the subject on grounds that are not in the training pictures, five noise levels. "Gain" is
the share of what the best gradient arm gains over the word at the start, mean over seeds. Rows are lines of
``results/words.jsonl``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import command_line
import torch
from quality_world import Bench
from torch import Tensor
from words_arms import ARMS, NAMES, WordArm
from words_curves import Curve
from words_formats import FORMATS, in_format, signal
from words_orthogonal import orthogonal
from words_report import write_report
from words_stronger import WAYS, StrongerSubject
from words_subject import PICTURES, Subject

logger = logging.getLogger("words")
FILE = "words.jsonl"
PARTS = ("arms", "formats", "memory", "card")


def subject_of(bench: Bench, name: str, arm: WordArm | None) -> Subject:
    """Return a subject as an arm's word is judged; without an arm, as a word of one vector."""
    if arm is not None and arm.way:
        return StrongerSubject(bench, name, WAYS[arm.way])
    return Subject(bench, name, arm.vectors if arm else 1)


def _as_learned(subject: Subject, arm: WordArm) -> Subject:
    """Return the subject with its model in the format in which an arm learns it."""
    if arm.stored == "fp32":
        return subject
    return Subject(in_format(subject.bench, arm.stored), subject.name, arm.vectors)


@contextmanager
def _directions_of(arm: WordArm) -> Iterator[None]:
    """Draw an arm's directions for the duration of a ``with`` block."""
    from blockskip_pack.blockskip_core.zoodip import training
    from blockskip_pack.blockskip_core.zoodip.directions import directions

    drawn = (lambda *which: orthogonal(directions(*which))) if arm.orthogonal else directions
    with patch.object(training, "directions", drawn):
        yield


def learn(subject: Subject, arm: WordArm, seed: int) -> tuple[Tensor, Curve]:
    """Return the word that an arm learns."""
    from blockskip_pack.blockskip_core.training.observer import OnStep
    from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule
    from blockskip_pack.blockskip_core.zoodip.settings import WordSettings
    from blockskip_pack.blockskip_core.zoodip.training import WordResult, WordTraining

    steps = arm.forwards // WordSettings(steps=1, **arm.settings).passes_per_step
    settings = WordSettings(steps=steps, seed=seed, **arm.settings)
    examples = ExampleSchedule(
        seed, PICTURES, lowest=settings.lowest, highest=settings.highest, pool=settings.pool, mirror=settings.mirror
    )
    result = WordResult()
    training = WordTraining(subject.losses, subject.layout, subject.first, examples, settings, result=result)
    curve = Curve(steps, settings.passes_per_step)
    with _directions_of(arm), subject.losses.loaded(settings.passes_per_step):
        training.run([OnStep(lambda report: curve.after(report.step, training.word))])
    assert result.forwards <= arm.forwards
    return training.word, curve


def learn_by_gradient(
    subject: Subject, seed: int, forwards: int, batch: int, step_size: float, lowest: float = 0.0, highest: float = 1.0
) -> tuple[Tensor, Curve]:
    """Return the word of gradient textual inversion: Adam, a cosine step size, ``batch`` examples per step."""
    from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule

    examples = ExampleSchedule(seed, PICTURES, lowest=lowest, highest=highest)
    word = (subject.first / subject.layout.sizes).clone().requires_grad_()
    optimizer = torch.optim.Adam([word], lr=step_size)
    steps = forwards // batch
    curve = Curve(steps, batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        drawn = [examples[step * batch + row] for row in range(batch)]
        optimizer.zero_grad()
        _loss(subject, word * subject.layout.sizes, drawn).backward()
        optimizer.step()
        schedule.step()
        curve.after(step + 1, word * subject.layout.sizes)
    return word.detach() * subject.layout.sizes, curve


def _loss(subject: Subject, word: Tensor, examples: list) -> Tensor:
    """Return the mean loss of a word with its graph; the same error as in ``hosts/words/losses.py``."""
    losses, encoder, model = subject.losses, subject.bench.clip.cond_stage_model, subject.bench.model.model
    tokens = [losses._captions.tokens(e.picture, subject.layout.split(word))["words"][0] for e in examples]
    context, pooled = encoder._encode_vectors(
        torch.stack([torch.stack([encoder._vector(t) for t, _ in row]) for row in tokens])
    )
    clean = torch.cat([losses._latents[e.picture : e.picture + 1] for e in examples])
    noise = torch.cat([e.noise((1, *clean.shape[1:])) for e in examples])
    sigma = torch.tensor([max(e.level, 1e-3) for e in examples])
    mix = sigma.view(-1, 1, 1, 1)
    denoised = model.apply_model((1 - mix) * clean + mix * noise, sigma, c_crossattn=context, y=pooled)
    return ((clean - denoised) / mix).square().mean()


@contextmanager
def _differentiable(bench: Bench) -> Iterator[None]:
    """Make the world's model differentiable for the duration of a ``with`` block."""
    import comfy.model_management
    import world_dit

    model = bench.model.model.diffusion_model
    try:
        model.requires_grad_(False)
        world_dit.prepare_for_training(model)
        yield
    finally:
        comfy.model_management.in_training = False
        for block in (*model.double_blocks, *model.single_blocks):
            del block.forward  # the class's own again


def measure(subject: Subject, arm: WordArm | None, seed: int) -> dict[str, Any]:
    """Return the row of an arm; without one, that of the word at the start."""
    started, word, curve = time.process_time(), subject.first, Curve(0, 0)
    if arm is not None and arm.gradient:
        with _differentiable(subject.bench):
            word, curve = learn_by_gradient(subject, seed, arm.forwards, **arm.settings)
    elif arm is not None:
        word, curve = learn(_as_learned(subject, arm), arm, seed)
    seconds = time.process_time() - started
    moved = ((word - subject.first) / subject.layout.sizes).square().mean().sqrt().item()
    return {
        "subject": subject.name, "arm": arm.name if arm else "start", "group": arm.group if arm else "start", "seed": seed,
        "forwards": arm.forwards if arm else 0, "loss": subject.held_out_loss(word), "seconds": round(seconds, 1),
        "moved": round(moved, 3), "curve": curve.measured(subject.held_out_loss), **subject.likeness(word),
    }  # fmt: skip


def _measure_formats(bench: Bench, file: Path, done: list[dict[str, Any]]) -> None:
    """Measure what is missing of the formats: the check of the perturbation."""
    known = {row.get("format") for row in done}
    for name in FORMATS:
        if name in known:
            continue
        agreement = signal(Subject(in_format(bench, name), "toby"))
        row = {"group": "formats", "format": name, "agreement": agreement}
        command_line.add_row(file, row)
        done.append(row)
        logger.info("%s", row)


def _measure_memory(parts: list[str], comfyui: Path, file: Path, done: list[dict[str, Any]]) -> None:
    """Count what learning a word needs, and run it on an emulated card, as far as that is missing."""
    import words_card
    import words_memory

    counted = any(row.get("group") == "memory" for row in done)
    ways = {
        "memory": lambda: () if counted else words_memory.rows(),
        "card": lambda: words_card.rows(comfyui, list(done)),
    }
    for name in (name for name in ways if name in parts):
        for row in ways[name]():
            command_line.add_row(file, {"group": name, **row})
            done.append({"group": name, **row})


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows and table go")
    parser.add_argument("--subjects", nargs="+", default=["mila", "zuzu", "nori", "toby", "pip"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="ARM", help="only these arms")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the table."""
    options = parse()
    command_line.begin(options, logger)
    import host

    file = options.results / FILE
    done = command_line.rows_in(file)
    known = {(row["subject"], row["arm"], row["seed"]) for row in done if "arm" in row}
    on_the_world = not options.report and bool({"arms", "formats"} & set(options.parts))
    bench = Bench(host.ASSETS, options.results) if on_the_world else None
    cells = [
        (None, 0),
        *(
            (arm, seed)
            for seed in options.seeds
            for arm in ARMS
            if seed < arm.seeds and arm.name in (options.only or NAMES)
        ),
    ]
    subjects = options.subjects if bench and "arms" in options.parts else []
    for (arm, seed), name in itertools.product(cells, subjects):
        if (name, arm.name if arm else "start", seed) in known:
            continue
        row = measure(subject_of(bench, name, arm), arm, seed)
        command_line.add_row(file, row)
        done.append(row)
        logger.info("%s", row)
    if bench and "formats" in options.parts:
        _measure_formats(bench, file, done)
    if not options.report:
        _measure_memory(options.parts, options.comfyui, file, done)
    write_report(options.results / "words.md", done)


if __name__ == "__main__":
    main()
