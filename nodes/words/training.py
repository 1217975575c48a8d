"""The work of Train Word: check the perturbation, learn, save however it ends, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...blockskip_core.errors import TrainingError
from ...blockskip_core.hosts.files.lora_files import word_samples
from ...blockskip_core.hosts.models.out_of_memory import (
    OutOfMemoryError,
    is_out_of_memory,
    log_and_release,
    out_of_memory_explained,
)
from ...blockskip_core.hosts.runs.outcome import Sample
from ...blockskip_core.hosts.runs.peak_memory import PeakMemory
from ...blockskip_core.training.checkpoints import RunIdentity
from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.zoodip.settings import WordSettings
from ...blockskip_core.zoodip.training import WordResult, WordTraining
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress
from ..run.samples import RunSamples
from .display import WordDisplay
from .events import WordEvents
from .prepare import PreparedWord, prepare
from .report import report, summary_line
from .request import WordRequest

logger = logging.getLogger(__name__)

ADVICE = "Lower `directions` or `resolution`, or set `residency` to in turns."


@dataclass(frozen=True)
class TrainedWord:
    """The outputs of Train Word.

    Attributes:
        word: What to write in a prompt.
        losses: The mean loss of each step.
        steps: Steps done.
        report: What was done, as text.
    """

    word: str
    losses: list[float]
    steps: int
    report: str


def train_word(
    model: Any, clip: Any, vae: Any, images: Any, request: WordRequest, progress: NodeProgress, chart: LiveChart
) -> TrainedWord:
    """Learn a word as requested, and save it.

    Raises:
        BlockSkipError: If the run cannot start or continue; the message names the file with the word so far. Any other
            exception, including Cancel, is passed on after the word so far has been saved.
    """
    with out_of_memory_explained("Learning the word", ADVICE):
        run = prepare(model, clip, vae, images, request, progress)
        with run.losses.loaded(run.settings.passes_per_step):
            return _learned(run, progress, chart)


def _learned(run: PreparedWord, progress: NodeProgress, chart: LiveChart) -> TrainedWord:
    result, steps = WordResult(), run.settings.steps
    checkpoints = run.checkpoints(result.problems)
    examples = run.request.examples(run.settings, run.num_pictures)
    display = WordDisplay(run.settings, result, progress, chart, run.losses.device)

    def wait_for_another(step: int) -> None:
        progress("waiting for another process that learns the same word", min(step, steps), steps)

    training = WordTraining(
        run.losses, run.layout, run.first, examples, run.settings, result=result, checkpoints=checkpoints
    )
    with checkpoints.to_itself(wait_for_another):
        training.resume()
        signal = None if result.resumed_at else run.measured(progress)  # a run keeps what it began with
        if signal is not None:
            training.perturbation = signal.perturbation
        settings = replace(run.settings, perturbation=training.perturbation)
        display.earlier()
        with _events(run, settings, result, display) as events:
            samples = _samples(run, settings, training, result, display.memory, progress, chart)
            word = _saved_however_it_ends(run, settings, training, result, [*events, *samples, display])
    progress.say(summary_line(word, settings, result))
    text = report(run, settings, signal, training, result, word, display.peak)
    return TrainedWord(word, result.losses, result.steps, text)


@dataclass
class WordOutcome:
    """The result of a run, for its samples.

    Attributes:
        memory: Memory use of the device.
        path: Beside which pictures are saved.
        result: The training loop's result.
        samples: Pictures, in order.
    """

    memory: PeakMemory
    path: Path
    result: WordResult
    samples: list[Sample] = field(default_factory=list)


def _samples(
    run: PreparedWord, settings: WordSettings, training: WordTraining, result: WordResult, memory: PeakMemory,
    progress: NodeProgress, chart: LiveChart,
) -> list[RunSamples]:  # fmt: skip
    """Return what samples while training, if it is asked for."""
    sampler, key = run.sampler, run.identity.key
    if sampler is None:
        return []
    pictures = RunIdentity({"run": key, **sampler.request.identity}).key  # other prompts do not replace their files
    outcome = WordOutcome(memory, word_samples(Path(run.name.name), pictures), result)

    def sampled(*, on_step: Callable[[int, int], None]) -> list[Tensor]:
        return sampler.pictures(training.word, on_step=on_step)

    return [RunSamples(outcome, progress, chart, sampler.request, sampled, steps=settings.steps, key=key)]


@contextmanager
def _events(
    run: PreparedWord, settings: WordSettings, result: WordResult, display: WordDisplay
) -> Iterator[list[WordEvents]]:
    """Yield what writes the files for TensorBoard, if they are asked for."""
    if not run.request.tensorboard:
        yield []
        return
    events = WordEvents(run.name.name, run.identity.key, settings.steps, result, display.memory)
    try:
        yield [events]
    finally:
        events.close()


def _saved_however_it_ends(
    run: PreparedWord, settings: WordSettings, training: WordTraining, result: WordResult,
    observers: Sequence[TrainingObserver],
) -> str:  # fmt: skip
    """Make the remaining steps and save the word; return what to write in a prompt."""

    def save() -> str:
        about = {**run.request.about(settings), "steps": result.steps}
        return run.name.save(run.layout.split(training.word), about)

    try:
        training.run(observers)
    except (TrainingError, OutOfMemoryError) as error:
        if not result.steps:
            raise
        raise type(error)(f"{error} The word so far is saved as {save()}.") from None
    except BaseException as error:  # including Cancel at any moment
        if not result.steps:
            raise
        saved = save()
        logger.info("BlockSkip: the word after %d steps is saved as %s", result.steps, saved)
        if not is_out_of_memory(error):
            raise
        failed = f"Learning the word ran out of memory after step {result.steps} ({log_and_release(error)})."
        raise OutOfMemoryError(f"{failed} {ADVICE} The word so far is saved as {saved}.") from None
    return save()
