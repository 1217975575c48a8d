"""One arm of the benchmark ``rival``, in a separate process: the nodes' run with given settings, on an emulated card.

Takes an arm as JSON and prints the measurements as one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from card_runs import STEPS, Bench, Cell, Plan, installed_card

MODEL, SIDE, CARD = "Qwen-Image-2.1", 704, 80.0  # SIDE: pixels; CARD: GiB, more than any arm takes


@dataclass(frozen=True)
class Arm:
    """What to run.

    Attributes:
        front, back: Numbers of blocks without adapters at both ends; 0 and 0 train all.
        back_residual: How the last ones are replaced, see Precompute Residuals.
        weights: Format of the kept and of the frozen blocks.
    """

    front: int
    back: int
    back_residual: str
    weights: str


class ArmBench(Bench):
    """A bench with an arm's settings in the place of Memory Plan's."""

    side = sides = SIDE

    def __init__(self, arm: Arm, card: Any, folder: Path) -> None:
        self._arm, self.back = arm, arm.back_residual
        super().__init__(Cell(MODEL, "bf16", CARD), card, folder)

    def select(self) -> Any:
        """Choose the arm's blocks."""
        arm = self._arm
        return self._run(
            "SelectBlocks", positive=self.caption, method="manual", skip_ratio=0.5, front=arm.front, back=arm.back
        )[0]

    def plan(self) -> Plan:
        """Count the arm's settings."""
        from blockskip_pack.blockskip_core.accounting.plan import MemorySettings
        from blockskip_pack.blockskip_core.training.config import TrainingConfig

        weights, frozen = self._arm.weights, self._arm.back if self.back == "exact" else 0
        settings = MemorySettings(
            config=TrainingConfig(steps=STEPS), quantize_kept=weights, patch_min=SIDE, frozen=frozen, quantize_frozen=weights
        )  # fmt: skip
        if frozen:
            self.selection = self.selection.with_exact_back()
        return Plan(settings, *self.counted(settings), {"settings": settings.describe()})


def seen_in(arm: Arm, folder: Path, comfyui: Path) -> dict[str, Any]:
    """Run an arm and return the measurements in bytes; ComfyUI must not have been imported before."""
    card = installed_card(Cell(MODEL, "bf16", CARD), comfyui)
    from command_line import about

    with ArmBench(arm, card, folder) as bench:
        chosen = bench.select()
        plan = bench.plan()
        bench.selection = chosen
        row = {**asdict(arm), "about": about(), "plan": plan.seen}
        row["precompute"], residuals = bench.precompute(plan)
        row["resident"] = bench.train(plan, residuals, "resident")
    return row


def main() -> None:
    """Run the arm given on the command line."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        row = seen_in(Arm(**json.loads(sys.argv[1])), Path(folder), Path(os.environ["COMFYUI_PATH"]))
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
