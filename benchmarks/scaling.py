"""How time and cost grow with GPUs, examples and model size: arithmetic from stated constants, nothing is run.

    python dev.py benchmark scaling               # writes results/scaling.md
    python dev.py benchmark scaling -- --teraflops 120 --network 3e9

What is counted (examples, steps, bytes reduced, bytes on disk) is exact: ``tests/benchmarks/test_scaling.py`` compares it
with two and four real processes. Seconds follow from it and from the constants below, which are assumptions.

Operations, with N weights and T tokens of an example: 2 N T for a forward pass. An example that is precomputed passes
all blocks once. A training example passes the kept blocks three times: forward, again for checkpointing, and backward
for the inputs alone, because weights have no gradients; the adapters' own operations are left out. A sum over P
processes sends 2 (P - 1) / P of its bytes from each (Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, 2009).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
GRADIENT_BYTES = 4  # float32
LOSS_BYTES = 8  # float64
SELF_CHECK = 2  # residuals that the check before the first step reads
COUNTS = (1, 2, 4, 8)

logger = logging.getLogger("scaling")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training.

    Attributes:
        name: For the table.
        draws: Training examples that are prepared.
        steps, accumulation, batch_size: Of the training; the last two together are the examples of a step.
        lora_numbers, lora_tensors: Trainable numbers, and the tensors that they are in.
        residual_bytes, latent_bytes: Stored bytes of an example.
        all_weights, kept_weights: Numbers in all blocks, and in those that run in training.
        tokens: Of an example, image and text.
    """

    name: str
    draws: int
    steps: int
    accumulation: int
    batch_size: int = 1
    lora_numbers: int
    lora_tensors: int
    residual_bytes: int
    latent_bytes: int
    all_weights: float
    kept_weights: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Constants of a machine; all are assumptions.

    Attributes:
        operations: Operations per second that a GPU reaches.
        network: Bytes per second that a process sends to the next one, copies to and from the GPU included.
        latency: Seconds that a sum takes at least, per message of its ring.
        disk: Bytes per second of the shared disk, for all processes together.
        start: Seconds until a process has loaded the model.
    """

    operations: float = 50e12
    network: float = 1e9
    latency: float = 2e-4
    disk: float = 1e9
    start: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one process does, counted.

    Attributes:
        steps: Optimiser steps.
        examples: Training examples that pass its model, repeats included.
        computed: Draws whose residuals it computes; of the process with the most.
        reduced_bytes: Bytes that it passes to sums.
        sent_bytes: Bytes that it sends for that.
        written_bytes: Bytes of residuals that it writes.
        read_bytes: Bytes of residuals that it reads, of the process that reads most: its share once to check it, and
            every residual when it is used. Process 0 also reads what all have computed, to check it.
    """

    steps: int
    examples: int
    computed: int
    reduced_bytes: int
    sent_bytes: float
    written_bytes: int
    read_bytes: int


def share_of(load: Workload, rank: int, processes: int) -> list[int]:
    """Return the draws that a process trains on, in order."""
    per_step, own = load.accumulation, load.accumulation // processes
    numbers = (step * per_step + rank * own + one for step in range(load.steps) for one in range(own))
    return [(number * load.batch_size + row) % load.draws for number in numbers for row in range(load.batch_size)]


def counted(load: Workload, processes: int, rank: int = 0) -> Counted:
    """Return what a process does of a workload with nothing stored.

    Raises:
        ValueError: If a step cannot be shared equally.
    """
    if load.accumulation % processes:
        raise ValueError(f"accumulation {load.accumulation} is no multiple of {processes} processes")
    share = share_of(load, rank, processes)
    computed = len(range(rank, load.draws, processes))
    several = processes > 1
    reduced = load.steps * several * (
        (load.lora_numbers + load.lora_tensors) * GRADIENT_BYTES + load.accumulation * LOSS_BYTES
    )  # fmt: skip
    stored = load.residual_bytes + load.latent_bytes
    verified = len(set(share)) if several else load.draws
    adopted = load.draws * (several and rank == 0)
    return Counted(
        steps=load.steps,
        examples=len(share),
        computed=computed,
        reduced_bytes=reduced,
        sent_bytes=reduced * 2 * (processes - 1) / processes,
        written_bytes=computed * stored,
        read_bytes=(adopted + verified) * stored + (len(share) + SELF_CHECK) * load.residual_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a run's parts, of the slowest process."""

    start: float
    precomputing: float
    training: float
    summing: float
    disk: float

    @property
    def total(self) -> float:
        """All of them; as if nothing overlapped."""
        return self.start + self.precomputing + self.training + self.summing + self.disk


def estimated(load: Workload, machine: Machine, processes: int) -> Time:
    """Return how long a workload takes, if the machine's constants hold."""
    each = [counted(load, processes, rank) for rank in range(processes)]
    first = each[0]
    forward = 2 * load.tokens / machine.operations
    messages = 2 * (processes - 1) * load.steps * 2
    return Time(
        start=machine.start,
        precomputing=first.computed * load.all_weights * forward,
        training=first.examples * 3 * load.kept_weights * forward,
        summing=first.sent_bytes / machine.network + messages * machine.latency,
        disk=sum(one.written_bytes + one.read_bytes for one in each) / machine.disk,
    )


FLUX_1 = Workload(
    name="FLUX.1, half skipped, 256 px", draws=400, steps=500, accumulation=8, lora_numbers=19_000_000, lora_tensors=336,
    residual_bytes=4_720_000, latent_bytes=65_536, all_weights=11.8e9, kept_weights=4.0e9, tokens=768,
)  # fmt: skip
WORKLOADS = (
    FLUX_1,
    replace(FLUX_1, name="ten times the examples and steps", draws=4000, steps=5000),
    replace(
        FLUX_1, name="a model of three times the size", all_weights=3 * FLUX_1.all_weights,
        kept_weights=3 * FLUX_1.kept_weights, lora_numbers=33_000_000, residual_bytes=8_180_000,
    ),
)  # fmt: skip


def table(machine: Machine, loads: Sequence[Workload] = WORKLOADS) -> str:
    """Return the estimates as a table in Markdown."""
    lines = [
        "| Training | GPUs | Precomputing | Training | Summing | Disk | Total | Speed | Cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in loads:
        alone = estimated(load, machine, 1).total
        for processes in COUNTS:
            time = estimated(load, machine, processes)
            speed = alone / time.total
            cells = [
                load.name if processes == 1 else "",
                str(processes),
                *(
                    f"{seconds:,.0f} s"
                    for seconds in (time.precomputing, time.training, time.summing, time.disk, time.total)
                ),
                f"{speed:.2f} x",
                f"{processes / speed:.2f} x",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="not used")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--teraflops", type=float, default=Machine.operations / 1e12)
    parser.add_argument("--network", type=float, default=Machine.network, help="bytes per second")
    parser.add_argument("--disk", type=float, default=Machine.disk, help="bytes per second")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    machine = Machine(operations=options.teraflops * 1e12, network=options.network, disk=options.disk)
    text = f"# Scaling\n\nEstimated from stated constants, nothing measured: {machine}.\n\n{table(machine)}\n"
    path = options.results / "scaling.md"
    path.write_text(text, encoding="utf-8")
    logger.info("%s\n\nwritten to %s", table(machine), path)


if __name__ == "__main__":
    main()
