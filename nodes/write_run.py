"""Run Outside: writes a training as a file, for a command line on this machine or on another one."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..blockskip_core.hosts.files.lora_files import EXAMPLE_NAME, file_identity
from ..blockskip_core.hosts.files.names import name_below
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.runs.request import RunRequest
from ..blockskip_core.hosts.runs.writing import write_run
from .inputs import NO_FILE, checked, connected, connected_if_any, refusal, require_formats, single
from .page.progress import NodeProgress
from .train_lora import later_inputs, training_inputs

EXAMPLE_RUN = "runs/my_run"


class WriteRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_WriteRun",
            display_name="Run Outside",
            category="BlockSkip/training",
            description=(
                "Writes what Dynamic Patch Trainer would do as a file, with latents and captions beside it, and says the "
                "command that does it: in a terminal, on several GPUs, or on another machine. It starts nothing itself."
            ),
            search_aliases=[
                "blockskip", "torchrun", "multi gpu", "multigpu", "several gpus", "accelerate", "command line", "headless",
                "cloud", "export training", "lora training",
            ],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            # The trainer's inputs, so that its values can be copied; but nothing samples pictures outside.
            inputs=[
                *(each for each in training_inputs() if each.id != "samples"),
                io.String.Input(
                    "run_name", default="runs/blockskip", optional=True,
                    tooltip="Where the run file is written, below ComfyUI's output folder; a number is appended.",
                ),
                *later_inputs(),
            ],
            outputs=[
                io.String.Output("run_file", display_name="run_file", tooltip="The run file's path."),
                io.String.Output(
                    "command", display_name="command",
                    tooltip="The command for this machine and one process.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, output_name: Any = None, run_name: Any = None, quantize_kept: Any = None, quantize_frozen: Any = None
    ) -> bool | str:
        """Refuse names that cannot be saved, and formats that this ComfyUI lacks, when the graph is queued."""
        for value, name, example in ((output_name, "output_name", EXAMPLE_NAME), (run_name, "run_name", EXAMPLE_RUN)):
            said = _name_problem(single(value, name), example)
            if said is not True:
                return said
        return refusal(lambda: require_formats(quantize_kept=quantize_kept, quantize_frozen=quantize_frozen))

    @classmethod
    def fingerprint_inputs(cls, start_file: Any = (NO_FILE,), **_others: Any) -> str:
        """Run again when the file to start from has changed; ComfyUI only sees its name."""
        return file_identity(start_file[0])

    @classmethod
    def execute(
        cls, model: Any, residuals: Any, start_from: Any = None, run_name: Any = "runs/blockskip", **settings: Any
    ) -> io.NodeOutput:
        model, residuals = connected(model=model, residuals=residuals).values()
        asked = checked(cls, run_name=run_name, **settings)
        name = asked.pop("run_name")
        request = RunRequest(**connected_if_any(start_from=start_from), **asked)
        with out_of_memory_explained("Preparing the run", "Unload whatever else uses the device, and queue again."):
            written = write_run(model, residuals, request, name)
        NodeProgress(cls.hidden.unique_id).say(f"Written as {written.path.name}. The command: {written.command}")
        return io.NodeOutput(str(written.path), written.command)


def _name_problem(name: Any, example: str) -> bool | str:
    return True if name is None else refusal(lambda: name_below(name, example))
