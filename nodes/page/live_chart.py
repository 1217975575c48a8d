"""Feed the chart on the trainer's node: events during a run, and routes for pages opened later, summaries and samples.

The page's side is ``web/js/live_chart.js``. Events go to every open page, which uses those of its own workflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from comfy.model_management import InterruptProcessingException
from server import PromptServer, web  # web: the host's own aiohttp.web, for the route's answers

from ...blockskip_core.reporting.run_history import RunHistory

EVENT = "blockskip.train"
ROUTE = "/blockskip/last_run"
SUMMARY_ROUTE = "/blockskip/summary"
SAMPLE_ROUTE = "/blockskip/sample_now"
SUMMARY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
}
SECONDS_BETWEEN_EVENTS = 0.25
POINTS_IN_OUTPUT = 500
"""Maximum number of points in the node's output, which the host keeps in its history."""
NO_SAMPLES = "Only a run in progress with Sample While Training connected can sample now."
LONGEST_ID = 200
LONGEST_MESSAGE = 1000
NO_ID = "00000000-0000-0000-0000-000000000000"
"""The page's id for a graph that did not come from a workflow file; each reload gives such a graph another id."""
TRAINER = "BlockSkip_TrainLora"
PRECOMPUTING = ("computing residuals", "fitting the linear back residual")
"""Phases of a trainer that computes its residuals itself, a chunk at a time."""

HISTORY = RunHistory()


class LiveChart:
    """Follows one run of the trainer; as a context manager it also records how the run ended.

    Args:
        hidden: The node's hidden inputs, which give its id and its workflow.
    """

    def __init__(self, hidden: Any) -> None:
        self._record = HISTORY.begin(str(hidden.unique_id), workflow_of(hidden))
        self._last_sent = 0.0

    def __enter__(self) -> LiveChart:
        self._send(now=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cancelled = kind is not None and issubclass(kind, InterruptProcessingException)
        status = "done" if kind is None else "cancelled" if cancelled else "failed"
        if status == "failed":
            self._record.note(message=str(error).split("\n")[0][:LONGEST_MESSAGE])
        self._record.note(status=status, phase=status, detail="", done=None, total=None, seconds_left=None)
        self._record.sample_made()
        self._send(now=True)

    @property
    def wants_sample(self) -> bool:
        """Whether a user has asked for a sample that is not made yet."""
        return self._record.wants_sample

    def offer_samples(self, offered: bool) -> None:
        """Let users ask for a sample, or no longer; what was asked for before is done."""
        self._record.sample_made()
        self._record.note(can_sample=offered)
        self._send(now=True)

    def sample(self, step: int, prompt: int, file: str, subfolder: str, likeness: float | None = None) -> None:
        """Show a picture sampled after ``step`` steps, a file below the host's output folder."""
        self._record.add_sample(step, prompt, file, subfolder, likeness)
        self._send(now=True)

    def saved(self, lora: Path | None, summary: Path | None, *, resumes: bool, problems: Sequence[str]) -> None:
        """Record what a run has saved at its end, also if it ends early.

        Args:
            lora: The LoRA's file, or None if it could not be saved.
            summary: The summary's file, which the page can then open by the run's id.
            resumes: Whether queueing the same graph again resumes the run.
            problems: Sentences on what went wrong without ending the run.
        """
        self._record.summary = summary
        message = " ".join(problems)[:LONGEST_MESSAGE]
        self._record.note(saved_as=lora and lora.name, summary=summary is not None, resumes=resumes, message=message)

    def phase(self, phase: str, done: int, total: int) -> None:
        """Show what the node is doing apart from training steps, which are shown by :meth:`step`."""
        if phase.startswith("training"):
            return
        word = "precomputing" if phase in PRECOMPUTING else "sampling" if phase.startswith("sampling") else "preparing"
        self._record.note(phase=word, detail=phase, done=done, total=total)
        self._send()

    def earlier(self, losses: Sequence[float], steps: int) -> None:
        """Show the steps of the interrupted run that this one resumes."""
        self._record.add_earlier(losses, steps)

    def step(self, step: int, steps: int, loss: float, learning_rate: float, **figures: Any) -> None:
        """Show a finished training step.

        Args:
            step, steps, loss, learning_rate: See `RunRecord.add_step`.
            figures: seconds_per_step, seconds_left (s); memory_now, memory_peak (bytes), memory_of.
        """
        self._record.add_step(step, steps, loss, learning_rate)
        self._record.note(phase="training", detail="", done=None, total=None, **figures)
        self._send()

    def output(self) -> dict[str, Any]:
        """Return the run as an entry of the node's ``ui``, so that a cached run shows it again."""
        return {"blockskip_chart": [self._record.snapshot(POINTS_IN_OUTPUT)]}

    def _send(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._last_sent >= SECONDS_BETWEEN_EVENTS:
            self._last_sent = time.monotonic()
            send(self._record.news())


def announcer(hidden: Any, phase: str) -> Callable[[str, int, int], None]:
    """Return a progress callback for a node upstream of trainers, whose charts show its progress as ``phase``."""
    trainers = trainers_behind(hidden.prompt, hidden.unique_id)
    workflow = workflow_of(hidden)
    last_sent = 0.0

    def announce(what: str, done: int, total: int) -> None:
        nonlocal last_sent
        if time.monotonic() - last_sent < SECONDS_BETWEEN_EVENTS and done < total:
            return
        last_sent = time.monotonic()
        for trainer in trainers:
            progress = {"phase": phase, "detail": what, "done": done, "total": total}
            send({"node": trainer, "workflow": workflow, **progress})

    return announce


def trainers_behind(prompt: Any, node_id: str | None) -> list[str]:
    """Return the ids of the trainers that use this node's outputs, directly or through other nodes."""
    if not isinstance(prompt, Mapping):
        return []
    readers: dict[str, list[str]] = {}
    for reader, node in prompt.items():
        for value in node.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2:
                readers.setdefault(str(value[0]), []).append(reader)
    found, behind = set(), [str(node_id)]
    while behind:
        for reader in readers.get(behind.pop(), []):
            if reader not in found:
                found.add(reader)
                behind.append(reader)
    return sorted(node for node in found if prompt[node].get("class_type") == TRAINER)


def workflow_of(hidden: Any) -> str | None:
    """Return the id of the workflow in which the prompt was queued, or None if it came from elsewhere."""
    info = hidden.extra_pnginfo
    workflow = info.get("workflow") if isinstance(info, Mapping) else None
    name = workflow.get("id") if isinstance(workflow, Mapping) else None
    return name if isinstance(name, str) and name and len(name) <= LONGEST_ID and name != NO_ID else None


def send(data: Mapping[str, Any]) -> None:
    """Send an event to every open page."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(EVENT, data)  # no client id, so that a second browser shows the run too


async def last_run(request: Any) -> Any:
    """Answer ``GET ?node=ID&workflow=ID`` with the node's last run as JSON, or null. Reads only from memory."""
    record = HISTORY.last(request.query.get("node", ""), request.query.get("workflow"))
    return web.json_response({"run": record and record.snapshot()}, headers={"Cache-Control": "no-store"})


async def summary(request: Any) -> Any:
    """Answer ``GET ?run=ID`` with the summary that this run has written, or 404.

    The path comes from the run's record, never from the request. The summary needs no script and no network, and gets
    neither.
    """
    record = HISTORY.run(request.query.get("run", ""))
    if record is None or record.summary is None or not record.summary.is_file():
        return web.json_response({"error": "This run has no summary, or ComfyUI was restarted since."}, status=404)
    return web.FileResponse(record.summary, headers=SUMMARY_HEADERS)


async def sample_now(request: Any) -> Any:
    """Answer ``POST ?run=ID``: the run samples at its next step, or 409 if there is no such run or it samples nothing."""
    record = HISTORY.run(request.query.get("run", ""))
    if record is None or not record.ask_for_sample():
        return web.json_response({"error": NO_SAMPLES}, status=409)
    send(record.news())
    return web.json_response({"asked": True})


def add_routes() -> None:
    """Add the routes for the latest runs, once: the host does not start if a route is registered twice."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    known = {getattr(route, "path", None) for route in server.routes}
    routes = server.routes
    for add, path, handler in (
        (routes.get, ROUTE, last_run), (routes.get, SUMMARY_ROUTE, summary), (routes.post, SAMPLE_ROUTE, sample_now),
    ):  # fmt: skip
        if path not in known:
            add(path)(handler)
