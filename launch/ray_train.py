"""A run outside ComfyUI as workers of Ray Train: ``python launch/ray_train.py --workers 2 -- run.json --output DIR ...``.

What follows ``--`` is the command line of ``blockskip_core.train``. Ray starts the workers, joins them with torch's gloo
and starts them again if one dies; the run then continues from its last saved state. All workers must see the same
folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

PACK = Path(__file__).resolve().parents[1]


def work(settings: dict[str, Any]) -> None:
    """Train this worker's share, in the process group that Ray has made."""
    sys.path.insert(0, settings["pack"])
    from blockskip_core.runs.command import main

    code = main(settings["arguments"])
    if code:
        raise RuntimeError(f"The training ended with code {code}; its log says why.")


def train(
    arguments: Sequence[str], workers: int, *, on_gpus: bool, restarts: int = 3, storage: str | None = None
) -> None:
    """Train with so many workers; raise if they fail more often than they may be started again."""
    trainer = TorchTrainer(
        work,
        train_loop_config={"arguments": list(arguments), "pack": str(PACK)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=restarts), storage_path=storage),
    )
    trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    end = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:end])
    train(sys.argv[end + 1 :], options.workers, on_gpus=not options.cpu)
