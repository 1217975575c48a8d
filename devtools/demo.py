"""The demo: draw a few pictures of a subject, train a LoRA of it in a real ComfyUI, and collect the results.

``python dev.py demo`` starts it inside the environment. It queues an ordinary API-format workflow; the pictures
come from the nodes with the titles in `demo_report`, the numbers from the trainer's "blockskip" output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import TextIO

import demo_report
from comfy_client import (
    ComfyClient,
    Event,
    Json,
    RequestRefused,
    RunResult,
    load_prompt,
    node_titled,
    titles_of,
    with_overrides,
)
from comfy_server import ROOT, ComfyServer, ServerProblem, demo_models, demo_pack
from made_files import MadeFiles

WORKFLOW = ROOT / "tests" / "workflows" / "train_lora.api.json"
INPUT_FOLDER = "blockskip_toby"  # where the workflow looks for the training pictures, whatever their subject
PLACES = ("on water, right", "on bricks, left", "on water, top")  # none of these grounds is in the training pictures
SETTINGS: dict[str, Json] = {
    "Select blocks": {"method": "skip and freeze", "skip_ratio": 0.5},
    "Precompute residuals": {"draws": 240, "patch_max": 256, "patch_order": "fixed", "back_residual": "exact"},
    "Train": {"steps": 300, "learning_rate": 0.006, "checkpointing": False},
    "Picture size": {"batch_size": 1},
    "Sample before": {"cfg": 2.5},
    "Sample after": {"cfg": 2.5},
}
"""What the demo changes in the workflow, which has the paper's way: the pack's default, a quarter of the blocks skipped and
half of them frozen, on whole pictures, which takes a few minutes on two cores."""
LOG = "server.log"
COUNTED = re.compile(r"(.+): \d+ of \d+")  # how a node names the part of its work that its progress bar counts
MARK = "made_by_the_demo.txt"  # only a folder that contains this file is ever emptied


class DemoProblem(RuntimeError):
    """The demo could not run; the message gives the reason in one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 if everything succeeded."""
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else logging.WARNING)
    try:
        show(options)
    except KeyboardInterrupt:
        say("demo: interrupted.", sys.stderr)
        return 130
    except Exception as problem:
        if options.verbose:
            raise
        hint = f" (see {options.output / LOG})" if isinstance(problem, ServerProblem) else ""
        say(f"demo: {first_line(problem)}{hint}", sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small LoRA in a real ComfyUI and show the results.")
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for the results")
    parser.add_argument("--subject", default="toby", help="the subject to learn: toby, mila, pip, zuzu or nori")
    parser.add_argument("--pictures", type=Path, help="a folder with 01.png, 01.txt, ... to learn from instead")
    parser.add_argument("--keep", action="store_true", help="keep the server running until Ctrl-C")
    parser.add_argument("--verbose", action="store_true", help="show full tracebacks")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="the API-format workflow to run")
    parser.add_argument("--timeout", type=float, default=3600.0, help="maximum duration of the run, in seconds")
    parser.add_argument(
        "--set", nargs=3, action="append", default=[], metavar=("TITLE", "INPUT", "VALUE"),
        help="change an input of a titled node, for a shorter run or another seed",
    )  # fmt: skip
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> None:
    """Draw the training pictures, train, collect the results, and keep the server running if requested."""
    host, packs = requirements(options.workflow)
    world = load_world()
    if options.subject not in world.SUBJECTS:
        raise DemoProblem(f"There is no subject {options.subject!r}: choose one of {', '.join(world.SUBJECTS)}.")
    prompt = load_prompt(options.workflow)
    if options.workflow == WORKFLOW:
        prompt = with_overrides(prompt, SETTINGS)
    prompt = with_prompts(prompt, [f"{world.SUBJECTS[options.subject]} {place}" for place in PLACES])
    prompt = with_overrides(prompt, overrides(options.set))
    if options.pictures:
        world.read_subject_folder(options.pictures)
    output = fresh_folder(options.output)
    pictures = output / "dataset" / INPUT_FOLDER
    if options.pictures:
        shutil.copytree(options.pictures, pictures)
    else:
        world.write_subject_folder(pictures, options.subject)
    say(f"Starting ComfyUI from {host}")
    placed = {"packs": packs, "models": demo_models(), "inputs": [pictures]}
    with ComfyServer(host, **placed, log_file=output / LOG) as server:
        if options.keep:
            say(f"The page is at {server.url} until you press Ctrl-C; what you queue there runs after the demo")
        made, client = MadeFiles(server.base / "output", output), ComfyClient(server.url)
        try:
            start = time.monotonic()
            result = run(client, prompt, options.timeout)
            summary = {**training_summary(result), "wall_time_seconds": time.monotonic() - start}
            loras = sorted((server.base / "output" / "loras").glob("*.*"))  # the LoRAs, and the summary of the last one
            demo_report.write(output, prompt, result.outputs, client.view, loras, summary, pictures)
            made.leave_out_present()
            say(f"\n{demo_report.table(summary)}\nThe results are in {output}")
            if options.keep:
                say(
                    "To train in the page: Templates, Extensions, blockskip_demo_nodes, BlockSkip 0 - Try it without a GPU"
                )
                keep(server)
        finally:
            keep_rest(client, made)


def keep_rest(client: ComfyClient, made: MadeFiles) -> None:
    """End what still runs, and keep what was made and is not among the results yet: the server's folder is temporary."""
    try:
        with contextlib.suppress(
            OSError, HTTPException, ValueError, RequestRefused
        ):  # it has ended, or is ending, by itself
            client.stop()
    finally:
        names = made.copy_new()
    if names:
        say(f"\nMade so far, and kept in {made.target}: {', '.join(names)}")


def requirements(workflow: Path) -> tuple[Path, dict[str, Path]]:
    """The ComfyUI to use and the demo's node pack, after checking that everything the demo needs exists."""
    if not os.environ.get("COMFYUI_PATH"):
        raise DemoProblem("COMFYUI_PATH is not set: start the demo with `python dev.py demo`.")
    packs = demo_pack()
    needed = [workflow, *(file for files in demo_models().values() for file in files)]
    missing = [str(file) for file in needed if not file.is_file()] + ([] if packs else ["its node pack"])
    if missing:
        raise DemoProblem(f"These parts of the demo are missing: {', '.join(missing)}.")
    for file in needed:
        if file.suffix == ".safetensors":
            require_whole(file)
    return Path(os.environ["COMFYUI_PATH"]), packs


def require_whole(file: Path) -> None:
    """Refuse a weights file that is truncated or not a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise DemoProblem(f"{file} is damaged ({error}). Get the repository's copy again.") from error


def overrides(triples: Sequence[Sequence[str]]) -> dict[str, Json]:
    """``[title, input, value]`` triples as ``{title: {input: value}}``; a value that is not JSON is text."""
    changes: dict[str, Json] = {}
    for title, name, value in triples:
        try:
            changes.setdefault(title, {})[name] = json.loads(value)
        except ValueError:
            changes.setdefault(title, {})[name] = value
    return changes


def with_prompts(prompt: Mapping[str, Json], texts: Sequence[str]) -> dict[str, Json]:
    """A copy of a workflow that samples several texts: everything downstream of the node "Prompt" is repeated for each.

    The copies' titles end in a number: "Before", "Before 2", "Before 3".
    """
    source = node_titled(prompt, "Prompt")
    chain = [source]
    for name in chain:
        chain += [
            other for other, node in prompt.items()
            if other not in chain and [name, 0] in [v for v in node["inputs"].values() if isinstance(v, list)]
        ]  # fmt: skip
    copied = json.loads(json.dumps(prompt))
    copied[source]["inputs"]["text"] = texts[0]
    for number, text in enumerate(texts[1:], start=2):
        for name in chain:
            node = json.loads(json.dumps(prompt[name]))
            node["_meta"]["title"] += f" {number}"
            for key, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in chain:
                    node["inputs"][key] = [f"{value[0]}/{number}", value[1]]
            copied[f"{name}/{number}"] = node
        copied[f"{source}/{number}"]["inputs"]["text"] = text
    return copied


def fresh_folder(folder: Path) -> Path:
    """`folder`, without the results of an earlier demo; a folder with other files is left alone."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DemoProblem(f"{folder} contains files that are not the demo's; pass an empty or a new folder to --output")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("Made by the BlockSkip demo, which empties this folder when it is run again.\n", "utf-8")
    return folder


def load_world() -> ModuleType:
    """The module that draws the demo's pictures."""
    folder = str(ROOT / "demo")
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing
    return importlib.import_module("world")


def run(client: ComfyClient, prompt: Mapping[str, Json], timeout: float) -> RunResult:
    """Run the workflow and show its progress; anything but success raises."""
    titles = titles_of(prompt)
    progress = ProgressLine(titles)
    try:
        result = client.run(prompt, progress, timeout)
    finally:
        progress.end()
    if result.error:
        title = titles.get(result.error["node_id"], result.error["node_type"])
        raise DemoProblem(f"The node {title!r} failed: {result.error['exception_message'].strip()}")
    if result.status != "success":
        raise DemoProblem(f"The run was {result.status}.")
    return result


def training_summary(result: RunResult) -> Json:
    """The trainer's report on its run."""
    reports = [output["blockskip"][0] for output in result.outputs.values() if output.get("blockskip")]
    if not reports:
        raise DemoProblem("No node of the workflow reported on the training.")
    return reports[-1]


def keep(server: ComfyServer) -> None:
    """Wait until Ctrl-C, or until the server ends by itself."""
    try:
        server.wait()
    except KeyboardInterrupt:
        say("\nStopping ComfyUI")
    else:
        raise ServerProblem("ComfyUI ended by itself")


class ProgressLine:
    """Shows a run's progress: one line that is rewritten in a terminal, a new line every few seconds elsewhere."""

    def __init__(self, titles: Mapping[str, str], stream: TextIO = sys.stdout, every: float = 5.0) -> None:
        self.titles = titles
        self.stream = stream
        self.every = every
        self.start = time.monotonic()
        self.node = self.work = ""
        self.told = 0.0

    def __call__(self, event: Event) -> None:
        """Handle an event of the run."""
        data = event.data
        if event.kind == "executing" and data.get("node"):
            self._enter(data["node"])
            self._show("")
        elif event.kind == "progress" and data.get("node"):
            self._enter(data["node"], self.work if data["node"] == self.node else "")
            self._show(f"{data['value']:.0f}/{data['max']:.0f}")
        elif event.kind == "text" and (counted := COUNTED.match(data["text"])):
            self._enter(data["node"], counted[1])

    def end(self) -> None:
        """Finish the line."""
        if self.node and self.stream.isatty():
            print(file=self.stream)

    def _enter(self, node: str, work: str = "") -> None:
        if (node, work) != (self.node, self.work):
            self.end()
            self.node, self.work, self.told = node, work, 0.0

    def _show(self, state: str) -> None:
        elapsed = time.monotonic() - self.start
        name = self.titles.get(self.node, self.node) + (f", {self.work}" if self.work else "")
        line = f"{elapsed:7.1f} s  {name}  {state}".rstrip()
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", file=self.stream, flush=True)
        elif not self.told or elapsed - self.told > self.every:
            print(line, file=self.stream, flush=True)
            self.told = elapsed


def first_line(problem: Exception) -> str:
    """The first line of an exception's message, or its class if the message is empty."""
    return str(problem).strip().partition("\n")[0].rstrip(":") or type(problem).__name__


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message for the user."""
    print(text, file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
