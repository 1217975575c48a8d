"""The request of Train Word: its widgets, validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...blockskip_core.errors import InvalidInputError
from ...blockskip_core.hosts.files.embedding_files import embedding_name
from ...blockskip_core.hosts.sampling.training_samples import MAX_PROMPTS, SampleRequest, require_request
from ...blockskip_core.hosts.words.captions import PLACE, require_place
from ...blockskip_core.hosts.words.losses import RESIDENCIES, Residency
from ...blockskip_core.zoodip.examples import ExampleSchedule
from ...blockskip_core.zoodip.settings import WordSettings, paper_settings
from ...blockskip_core.zoodip.subspace import SubspaceGradient

EstimatorChoice = Literal["leave-one-out", "forward difference", "central", "paper"]
ESTIMATOR_CHOICES: tuple[str, ...] = get_args(EstimatorChoice)
PAPER_LEVELS = {True: (0.62, 0.89), False: (0.5, 0.9)}
"""Is flow matching -> the paper's noise levels: t from 500 to 900 of 1000, or the sigmas with the same signal-to-noise."""


def lines_of(captions: str) -> list[str]:
    """Return the captions: one for all pictures, or one for each.

    Raises:
        InvalidInputError: If there is none.
    """
    lines = [line.strip() for line in captions.splitlines() if line.strip()]
    if not lines:
        raise InvalidInputError("captions is empty. Write one line for all pictures, such as: a photo of {word}")
    return lines


def require_estimator(estimator: str) -> None:
    """Raise InvalidInputError for an unknown estimator."""
    if estimator not in ESTIMATOR_CHOICES:
        raise InvalidInputError(f"estimator must be one of {', '.join(ESTIMATOR_CHOICES)}, got {estimator!r}.")


def require_usable(
    captions: str | None, name: str | None, estimator: str | None, noise_from: float | None, noise_to: float | None
) -> None:
    """Check what is known when the graph is queued; None is not known yet.

    Raises:
        InvalidInputError: With the sentence that the run would be refused with.
    """
    if captions is not None:
        require_place(lines_of(captions))
    if name is not None:
        embedding_name(name)
    if estimator is not None:
        require_estimator(estimator)
    # The estimator "paper" brings its own noise levels.
    if noise_from is not None and noise_to is not None and estimator not in (None, "paper"):
        ExampleSchedule(0, 1, lowest=noise_from, highest=noise_to)


@dataclass(frozen=True, kw_only=True)
class WordRequest:
    """The inputs of Train Word by their ids, except those that need a cable; defaults are those of the widgets.

    The node's tooltips explain each one.

    Raises:
        InvalidInputError: If one is out of range or of the wrong kind.
    """

    captions: str
    like_word: str
    name: str
    steps: int
    seed: int
    resolution: int = 512
    estimator: EstimatorChoice = "leave-one-out"
    directions: int = 8
    step_size: float = 0.4
    perturbation: float = 0.2
    check_perturbation: bool = True
    noise_from: float = 0.0
    noise_to: float = 1.0
    fixed_examples: int = 256
    subspace_every: int = 0
    subspace_share: float = 1e-3
    mirror: bool = False
    guidance: float = 1.0
    residency: Residency = "auto"
    save_every: int = 100
    resume: bool = True
    tensorboard: bool = False
    sample_prompts: str = ""
    samples: SampleRequest | None = None

    def __post_init__(self) -> None:
        require_estimator(self.estimator)
        if self.residency not in RESIDENCIES:
            raise InvalidInputError(f"residency must be one of {', '.join(RESIDENCIES)}, got {self.residency!r}.")
        for name in ("captions", "like_word", "sample_prompts"):
            if any("\ud800" <= char <= "\udfff" for char in getattr(self, name)):  # no tokenizer takes these
                raise InvalidInputError(f"{name} contains half of a character. Type it again.")
        if not self.guidance >= 0.0:
            raise InvalidInputError(f"guidance must not be negative, got {self.guidance}.")
        lines_of(self.captions)
        require_request(self.samples)
        for prompt in self.prompts:
            if PLACE not in prompt:
                raise InvalidInputError(
                    f"Every line of sample_prompts needs {PLACE} where the new word is, got {prompt!r}."
                )
        settings = self.settings(is_flow=True)
        self.examples(settings, 1)
        SubspaceGradient(1, settings.subspace_every, settings.subspace_share)

    @property
    def caption_lines(self) -> list[str]:
        """The captions: one for all pictures, or one for each."""
        return lines_of(self.captions)

    @property
    def prompts(self) -> list[str]:
        """What is sampled while training; nothing without a request, and captions, each once, without other prompts."""
        if self.samples is None:
            return []
        typed = [line.strip() for line in self.sample_prompts.splitlines() if line.strip()]
        return typed or list(dict.fromkeys(self.caption_lines))[:MAX_PROMPTS]

    def settings(self, *, is_flow: bool) -> WordSettings:
        """Return the settings of the training.

        Args:
            is_flow: Whether the model is trained by flow matching, which decides the paper's noise levels.
        """
        if self.estimator == "paper":
            lowest, highest = PAPER_LEVELS[is_flow]
            return paper_settings(self.steps, self.seed, lowest=lowest, highest=highest)
        return WordSettings(
            steps=self.steps, seed=self.seed, estimator=self.estimator, directions=self.directions,
            perturbation=self.perturbation, step_size=self.step_size, lowest=self.noise_from, highest=self.noise_to,
            pool=self.fixed_examples, mirror=self.mirror, subspace_every=self.subspace_every,
            subspace_share=self.subspace_share,
        )  # fmt: skip

    @staticmethod
    def examples(settings: WordSettings, num_pictures: int) -> ExampleSchedule:
        """Return the examples of a training with these settings."""
        return ExampleSchedule(
            settings.seed, num_pictures, lowest=settings.lowest, highest=settings.highest, pool=settings.pool,
            mirror=settings.mirror,
        )  # fmt: skip

    def about(self, settings: WordSettings) -> dict[str, Any]:
        """Return what is recorded in the word's file."""
        return {
            "method": f"ZOODiP, {self.estimator}", "like_word": self.like_word, "captions": self.caption_lines,
            "resolution": self.resolution, "directions": settings.directions, "step_size": settings.step_size,
            "perturbation": settings.perturbation, "noise_levels": [settings.lowest, settings.highest],
            "seed": self.seed, "steps_planned": self.steps,
        }  # fmt: skip
