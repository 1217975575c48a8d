"""Progress of a running node: its progress bar, a line of text under it, and the check for Cancel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.progress import get_progress_state
from PIL import Image
from server import PromptServer

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TEXTS = 0.5
LARGEST_PREVIEW = 512
"""Pixels of the longer side."""


class NodeProgress:
    """Shows the phases of a node's work to the user.

    Args:
        node_id: The running node.
        tell: Also called for every part, before the node is updated, with (phase, parts done, total).
        has_text: Whether to show a line of text under the node. False for a node whose chart says the same.
    """

    def __init__(
        self, node_id: str | None, tell: Callable[[str, int, int], None] | None = None, *, has_text: bool = True
    ) -> None:
        self._node_id = node_id if has_text else None
        self._tell = tell
        self._bar: comfy.utils.ProgressBar | None = None
        self._done = self._total = 0
        self._phase = ""
        self._last_text = 0.0

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``phase`` are finished.

        Raises:
            InterruptProcessingException: If the user pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None or total != self._total or done == 1:
            self._bar, self._total = comfy.utils.ProgressBar(total), total
        self._done = done
        is_new, self._phase = phase != self._phase, phase
        if self._tell:
            self._tell(phase, done, total)
        # Before the bar, so that whoever follows both knows what the bar counts.
        self._show(f"{phase}: {done} of {total}" + (f" · {detail}" if detail else ""), last=is_new or done >= total)
        self._bar.update_absolute(done, total)

    def show(self, picture: Image.Image) -> None:
        """Show a picture on the node, as samplers do, without changing the progress bar."""
        self._bar = self._bar or comfy.utils.ProgressBar(1)
        self._bar.update_absolute(self._done, preview=("JPEG", picture, LARGEST_PREVIEW))

    def show_while_another_runs(self, done: int, total: int, picture: Image.Image) -> None:
        """Show a picture and ``done`` of ``total`` steps on this node, whose own run is over, while a sampler runs.

        The host draws a bar without an id on the running node, so without an id nothing is shown.
        """
        if self._node_id is None:
            return
        bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
        bar.update_absolute(done, preview=("JPEG", picture, LARGEST_PREVIEW))
        if bar.hook is not None and done >= total:  # the host ends a node's progress only with the node's own run
            get_progress_state().finish_progress(self._node_id)

    def say(self, text: str) -> None:
        """Show a sentence that stays under the node after the run, and log it."""
        logger.info("BlockSkip: %s", text)
        self._show(text, last=True)

    def note(self, text: str, *, last: bool) -> None:
        """Show a line under the node without logging it; lines in quick succession are left out, but not the last."""
        self._show(text, last=last)

    def _show(self, text: str, *, last: bool) -> None:
        now = time.monotonic()
        server = getattr(PromptServer, "instance", None)
        if server is None or self._node_id is None or (now - self._last_text < SECONDS_BETWEEN_TEXTS and not last):
            return
        self._last_text = now
        server.send_progress_text(text, self._node_id)
