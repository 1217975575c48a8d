"""What the tests of all trainings need: a user who cancels, and the comparison of two results."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def cancelled_after(nodes, monkeypatch, step):
    """Cancel as a user would when this step is shown."""
    import comfy.model_management

    progress = nodes.page.progress.NodeProgress
    show = progress.__call__

    def cancelling(self, phase, done, total, detail=""):
        if phase == "training step" and done == step:
            raise comfy.model_management.InterruptProcessingException
        show(self, phase, done, total, detail)

    with monkeypatch.context() as patch:
        patch.setattr(progress, "__call__", cancelling)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            yield


def shown_in_tensorboard(folder):
    """What TensorBoard shows of a run: figure -> {step: value}, and picture -> steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = events.Tags()
    curves = {name: [(point.step, point.value) for point in events.Scalars(name)] for name in found["scalars"]}
    assert all(len(dict(points)) == len(points) for points in curves.values())  # no step twice
    # files of one second are read in the order of their numbers as text; a page draws points by step
    return {name: dict(sorted(points)) for name, points in curves.items()}, {
        name: [point.step for point in events.Images(name)] for name in found["images"]
    }


def assert_same(a, b):
    """Two results have the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
