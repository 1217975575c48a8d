"""Train Word: learns a word for a subject without gradients, and saves it as an embedding file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..blockskip_core.hosts.words.encoders import taking_embedding_files
from ..blockskip_core.hosts.words.losses import RESIDENCIES
from . import widgets
from .inputs import checked, connected, refusal, single, singles, tensorboard_refusal
from .page.live_chart import LiveChart
from .page.progress import NodeProgress
from .types import LossMapSocket, SamplesSocket
from .words.request import ESTIMATOR_CHOICES, WordRequest, require_usable
from .words.training import train_word


class TrainWord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_TrainWord",
            display_name="Train Word (ZOODiP)",
            category="BlockSkip/training",
            description=(
                "Learns a new word for a subject from a few pictures (textual inversion), with forward passes only "
                "(ZOODiP). It needs about the memory of sampling, and works on any model in any weight format that "
                "ComfyUI samples with. The word is saved to the embeddings folder, for use as embedding:NAME."
            ),
            search_aliases=["blockskip", "zoodip", "textual inversion", "embedding", "train word", "zeroth order"],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            # Saved workflows store widget values by position: new inputs go to the end.
            inputs=[*_required_inputs(), *_estimator_inputs(), *_example_inputs(), *_run_inputs()],
            outputs=[
                io.String.Output("word", display_name="word", tooltip="What to write in a prompt: embedding:NAME."),
                io.Clip.Output(
                    "clip", display_name="clip",
                    tooltip="The text encoder, for prompts with the word; also those that take no embedding files by themselves.",
                ),
                LossMapSocket.Output("loss_map", display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Int.Output("steps", display_name="steps", tooltip="Steps done."),
                io.String.Output("report", display_name="report", tooltip="What was done, and with what result."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, captions: Any = None, name: Any = None, estimator: Any = None, noise_from: Any = None, noise_to: Any = None,
        tensorboard: Any = None,
    ) -> bool | str:  # fmt: skip
        """Refuse captions, names and noise levels that no run can use, and a missing package, when the graph is queued."""
        known = {
            "captions": captions, "name": name, "estimator": estimator, "noise_from": noise_from, "noise_to": noise_to,
        }  # fmt: skip
        usable = refusal(lambda: require_usable(**singles(**known)))
        return tensorboard_refusal(tensorboard) if usable is True else usable

    @classmethod
    def execute(
        cls, model: Any, clip: Any, vae: Any, images: Any, samples: Any = None, **settings: Any
    ) -> io.NodeOutput:
        model, clip, vae = connected(model=model, clip=clip, vae=vae).values()
        with LiveChart(cls.hidden) as chart:
            request = WordRequest(**checked(cls, **settings), samples=single(samples, "samples"))
            progress = NodeProgress(cls.hidden.unique_id, chart.phase)
            done = train_word(model, clip, vae, images, request, progress, chart)
        outputs = (done.word, taking_embedding_files(clip), {"loss": done.losses}, done.steps, done.report)
        return io.NodeOutput(*outputs, ui=chart.output())


def _required_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model, as loaded; it is not changed."),
        io.Clip.Input("clip", tooltip="The model's text encoders; they are not changed."),
        io.Vae.Input("vae", tooltip="The model's VAE. It is used once, before the first step."),
        io.Image.Input("images", tooltip="3 to 10 pictures of one subject. Their middle squares are used."),
        io.String.Input(
            "captions", default="a photo of {word}", multiline=True,
            tooltip="One line for all pictures, or one line for each. {word} is where the new word is. Describe everything "
            "else that is in the picture, so that the word need not.",
        ),
        io.String.Input(
            "like_word", default="object",
            tooltip="A known word or a few to start from, as close to the subject as possible: dog, backpack. The new word "
            "has as many vectors as this has tokens; on our small model one was best.",
        ),
        io.String.Input(
            "name", default="my_word", tooltip="Name of the file in the embeddings folder; a number is appended."
        ),
        io.Int.Input(
            "steps", default=500, min=1, max=widgets.MOST_STEPS,
            tooltip="Number of steps; each takes `directions` forward passes. The paper takes 20,000 to 30,000 steps of 3.",
        ),
        widgets.seed("Determines directions, noise levels and noise."),
        widgets.side("resolution", 512, "Side in pixels to which the pictures are resized.", least=64, optional=True),
    ]  # fmt: skip


def _estimator_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "estimator", options=list(ESTIMATOR_CHOICES), default="leave-one-out", optional=True,
            tooltip="How the gradient is estimated. leave-one-out: each direction against the mean of the others. forward "
            "difference: against the word itself, as in the paper (one more forward pass). central: both ways (twice as "
            "many). paper: all settings of the paper; everything below down to `mirror` is then ignored.",
        ),
        io.Int.Input(
            "directions", default=8, min=1, max=64, optional=True,
            tooltip="Random directions per step. They go through the model as one batch, if the memory allows.",
        ),
        io.Float.Input(
            "step_size", default=0.4, min=0.001, max=10.0, step=0.01, round=0.001, optional=True,
            tooltip="Largest change of a number in one step, as a multiple of an ordinary word's numbers. It falls to 0 "
            "over the run.",
        ),
        io.Float.Input(
            "perturbation", default=0.2, min=0.0001, max=10.0, step=0.01, round=0.0001, optional=True, advanced=True,
            tooltip="How far the word is perturbed, in the same unit. bf16, fp16 and fp8 take nearly anything, int8 needs "
            "0.1 to 0.3.",
        ),
        io.Boolean.Input(
            "check_perturbation", default=True, optional=True, advanced=True,
            tooltip="Measure before the first step whether the loss follows this perturbation, half or twice of it, and "
            "use another if it is needed. A model that follows none is refused.",
        ),
    ]  # fmt: skip


def _example_inputs() -> list[io.Input]:
    return [
        widgets.noise_from("Lowest noise level, as a share of the model's training time: 0 is clean."),
        widgets.noise_to("Highest noise level: 1 is noise. The paper uses 0.5 to 0.9 for SD1.5."),
        io.Int.Input(
            "fixed_examples", default=256, min=0, max=100_000, optional=True, advanced=True,
            tooltip="Number of fixed (picture, noise level, noise), used in turn. 0: new ones in every step.",
        ),
        io.Int.Input(
            "subspace_every", default=0, min=0, max=100_000, optional=True, advanced=True,
            tooltip="The paper's subspace gradient: after so many steps, directions in which the word hardly moved are left "
            "out. The paper uses 128. 0: off.",
        ),
        io.Float.Input(
            "subspace_share", default=1e-3, min=1e-6, max=0.999, step=0.001, round=1e-6, optional=True, advanced=True,
            tooltip="The share of the word's movement that may be left out.",
        ),
        io.Boolean.Input(
            "mirror", default=False, optional=True, advanced=True,
            tooltip="Also use the mirrored pictures. Not for captions that say left and right, or subjects with writing.",
        ),
    ]  # fmt: skip


def _run_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "guidance", default=1.0, min=0.0, max=100.0, step=0.1, optional=True, advanced=True,
            tooltip="The guidance that FLUX.1-dev and its kin are given while the word is learned. Other models ignore it.",
        ),
        io.Combo.Input(
            "residency", options=list(RESIDENCIES), default="auto", optional=True, advanced=True,
            tooltip="together: text encoder and model stay loaded. in turns: one is unloaded for the other in every step, "
            "which is slow. auto: together if both fit.",
        ),
        io.Int.Input(
            "save_every", default=100, min=0, max=widgets.MOST_STEPS, optional=True,
            tooltip="Number of steps between training states to resume from. 0: only when the run ends, by itself or by "
            "Cancel.",
        ),
        io.Boolean.Input(
            "resume", default=True, optional=True,
            tooltip="Queueing the same graph again resumes an interrupted run where it stopped, and gives the same word. "
            "Off: start from the beginning.",
        ),
        io.Boolean.Input(
            "tensorboard", default=False, optional=True, advanced=True,
            tooltip="Also write losses, step size and memory of every step for TensorBoard, into the folder "
            "`tensorboard` in ComfyUI's output folder. Needs the Python package tensorboard.",
        ),
        io.String.Input(
            "sample_prompts", default="", multiline=True, optional=True,
            tooltip="What `samples` shows: one prompt on each line, with {word} where the new word is. Empty: the captions.",
        ),
        SamplesSocket.Input(
            "samples", optional=True,
            tooltip="From Sample While Training: pictures while training, of `sample_prompts`.",
        ),
    ]  # fmt: skip
