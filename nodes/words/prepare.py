"""Prepare a run that learns a word: check everything, encode the pictures, set up the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ...blockskip_core.errors import InvalidInputError
from ...blockskip_core.hosts.files.embedding_files import EmbeddingName
from ...blockskip_core.hosts.files.folders import run_folder
from ...blockskip_core.hosts.inputs.pictures import Pictures
from ...blockskip_core.hosts.models.identity import conditionings_identity, model_identity, tensors_identity
from ...blockskip_core.hosts.words.captions import WordCaptions
from ...blockskip_core.hosts.words.encoders import known_word
from ...blockskip_core.hosts.words.latents import square_latents
from ...blockskip_core.hosts.words.losses import WordLosses
from ...blockskip_core.hosts.words.noise_levels import is_flow
from ...blockskip_core.hosts.words.samples import WordSampler
from ...blockskip_core.training.checkpoints import KEPT_RUNS, Checkpoints, RunIdentity, remove_old_runs
from ...blockskip_core.version import VERSION
from ...blockskip_core.zoodip.settings import WordSettings
from ...blockskip_core.zoodip.signal import PAIRS, Signal, measure_signal
from ...blockskip_core.zoodip.word import WordLayout, WordPart
from ..page.progress import NodeProgress
from .memory import counted_memory
from .request import WordRequest

KEPT_STATES = 2


@dataclass(frozen=True, kw_only=True)
class PreparedWord:
    """A run that can start.

    Attributes:
        request: The request.
        name: Where the word will be saved.
        layout: The word's shape.
        first: The word at the start, shape (layout.numbers,).
        losses: The loss of words on an example.
        settings: The settings, with the perturbation asked for.
        num_pictures: Number of pictures.
        identity: What the run is, with the perturbation asked for: what a device measures is not sure to repeat.
        memory: What it needs and what there is, as a sentence; may be empty.
        sampler: Samples pictures while training, or None.
    """

    request: WordRequest
    name: EmbeddingName
    layout: WordLayout
    first: Tensor
    losses: WordLosses
    settings: WordSettings
    num_pictures: int
    identity: RunIdentity
    memory: str
    sampler: WordSampler | None

    def measured(self, progress: NodeProgress) -> Signal | None:
        """Return a perturbation that the model's loss follows, with what was measured; None if that is not asked for.

        Raises:
            TrainingError: If the loss follows none.
        """
        if not self.request.check_perturbation:
            return None
        return measure_signal(
            self.losses, self.first, self.layout.sizes, self.settings.perturbation,
            self.request.examples(self.settings, self.num_pictures).spread(PAIRS), self.settings.seed,
            lambda done, total: progress("perturbations checked", done, total),
        )  # fmt: skip

    def checkpoints(self, problems: list[str]) -> Checkpoints:
        """Return the training states of the run; those of old runs are removed.

        ``problems`` gets a sentence for each of them that was unfinished.
        """
        folder, request = run_folder(self.identity.key), self.request
        problems.extend(remove_old_runs(folder.parent, keep=KEPT_RUNS - 1, exclude=self.identity.key))
        return Checkpoints(folder, self.identity, every=request.save_every, keep=KEPT_STATES, resume=request.resume)


def settings_identity(request: WordRequest, settings: WordSettings) -> dict[str, Any]:
    """Return the parts of a run's identity that are settings, by name."""
    values = asdict(settings)
    if settings.schedule == "constant":  # otherwise the step size depends on the length of the run
        del values["steps"]
    # Without the check they are those of before it, whose states are this run's.
    return {**values, "check_perturbation": True} if request.check_perturbation else values


def encoded(captions: WordCaptions, vectors: Mapping[str, Tensor]) -> list[list]:
    """Return the CONDITIONINGs of captions with a word's vectors."""
    return [captions.clip.encode_from_tokens_scheduled(captions.tokens(i, vectors)) for i in range(len(captions))]


def sampler_for(
    request: WordRequest, losses: WordLosses, clip: Any, parts: Sequence[WordPart], vectors: Mapping[str, Tensor]
) -> WordSampler | None:
    """Return what samples the request's prompts, or None if it asks for none."""
    if request.samples is None:
        return None
    prompts = WordCaptions(clip, request.prompts, parts)
    return WordSampler(losses, prompts, request.samples, encoded(prompts, vectors))


def prepare(
    model: Any, clip: Any, vae: Any, images: Sequence[Any], request: WordRequest, progress: NodeProgress
) -> PreparedWord:
    """Check a request against its inputs, and set up what the run needs.

    Raises:
        BlockSkipError: If inputs do not fit together, or the word's file cannot be written.
    """
    name, pictures = EmbeddingName(request.name), Pictures(images)
    if len(request.caption_lines) not in (1, len(pictures)):
        raise InvalidInputError(
            f"captions needs one line for all pictures, or one line for each of the {len(pictures)} pictures, got "
            f"{len(request.caption_lines)} lines."
        )
    parts, vectors = known_word(clip, request.like_word)
    captions, layout = WordCaptions(clip, request.caption_lines, parts), WordLayout(parts)
    identity = model_identity(model)
    settings = request.settings(is_flow=is_flow(model.get_model_object("model_sampling")))
    latents = square_latents(
        vae, model.model, pictures, request.resolution, settings.mirror,
        lambda done, total: progress("pictures encoded", done, total),
    )  # fmt: skip
    losses = WordLosses(
        model, captions, layout, latents, len(pictures), guidance=request.guidance, residency=request.residency
    )
    memory = counted_memory(model, captions, layout, latents.shape[1:], settings, request.guidance, progress)
    first = layout.join(vectors)
    texts = encoded(captions, vectors)
    return PreparedWord(
        request=request, name=name, layout=layout, first=first, losses=losses, settings=settings,
        num_pictures=len(pictures), memory=memory, sampler=sampler_for(request, losses, clip, parts, vectors),
        identity=RunIdentity({
            "kind": "word", "model": identity, "texts": conditionings_identity(texts), "latents": tensors_identity([latents]),
            "first": tensors_identity([first]), "guidance": request.guidance, "made by": f"BlockSkip {VERSION}",
            **settings_identity(request, settings),
        }),
    )  # fmt: skip
