"""Load Training Folder: loads pictures or videos with their captions, whichever program wrote them."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.inputs.folder_variants import with_mirrored, with_trigger
from ..blockskip_core.hosts.inputs.training_folder import (
    LoadedFolder,
    folder_identity,
    input_folder,
    load_training_folder,
)
from . import widgets
from .inputs import NO_FILE, checked, refusal
from .page.progress import NodeProgress
from .types import TrainingFilesSocket


class LoadTrainingFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_LoadTrainingFolder",
            display_name="Load Training Folder",
            category="BlockSkip/training",
            description=(
                "Loads pictures or videos and their captions from a folder in ComfyUI's input folder. Reads text files in any "
                "common encoding, rotates photos upright, keeps 16-bit grey, puts transparent pictures on white, "
                "reports missing captions, and names a file that cannot be read."
            ),
            search_aliases=["blockskip", "load folder", "dataset", "captions", "training images", "lora training", "lora dataset"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "folder", options=folder_paths.get_input_subfolders(),
                    tooltip="A folder in ComfyUI's `input` folder, with pictures and a `.txt` of the same name for "
                    "each. R refreshes the list.",
                ),
                io.String.Input(
                    "trigger_word", default="", optional=True,
                    tooltip="Put in front of every caption that does not contain it: the name of your subject, e.g. `sks toy`. "
                    "Acts on `texts` only. Empty: captions stay as they are.",
                ),
                io.Boolean.Input(
                    "flip", default=False, optional=True, advanced=True,
                    tooltip="Also use every picture mirrored left to right. Not for subjects with writing or a side that matters.",
                ),
                widgets.frames(
                    "1: load pictures. More: load the folder's videos as clips of this many pictures, at their own frame "
                    "rate; set the same on Precompute Residuals."
                ),
                io.Int.Input(
                    "clips_per_video", default=1, min=1, max=1000, optional=True, advanced=True,
                    tooltip="How many clips to load from the beginning of each video; a shorter video gives fewer.",
                ),
                io.Combo.Input(
                    "reference_folder", options=[NO_FILE, *folder_paths.get_input_subfolders()], default=NO_FILE,
                    optional=True,
                    tooltip="For edit models: a folder with the picture before the edit for each picture, under the same "
                    "name (`cat.png`, or `cat_1.png`, `cat_2.png` for several).",
                ),
                io.Boolean.Input(
                    "with_pictures", default=False, optional=True, advanced=True,
                    tooltip="Only with `frames` above 1: also load the folder's pictures. Each is trained as a video of one "
                    "frame, beside the clips.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "images", display_name="images", is_output_list=True, tooltip="The pictures, in the order of their names."
                ),
                io.String.Output(
                    "texts", display_name="texts", is_output_list=True,
                    tooltip="Their captions, for CLIP Text Encode; empty if there is none.",
                ),
                TrainingFilesSocket.Output(
                    "files", display_name="files", is_output_list=True,
                    tooltip="For Precompute Residuals, which then names pictures by their files.",
                ),
                io.Image.Output(
                    "references", display_name="references", is_output_list=True,
                    tooltip="The pictures of `reference_folder`, those of the first picture first; for Precompute "
                    "Residuals.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        """Refuse a folder that is not there when the graph is queued, and say where to make it."""
        return True if folder is None else refusal(lambda: input_folder(folder))

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, reference_folder: Any = NO_FILE, **_others: Any) -> str:
        """Run again when a file of the folders has changed."""
        names = [folder, *([] if reference_folder == NO_FILE else [reference_folder])]
        return " ".join(folder_identity(name) for name in names if isinstance(name, str))

    @classmethod
    def execute(
        cls, folder: Any, trigger_word: Any = "", flip: Any = False, frames: Any = 1, clips_per_video: Any = 1,
        reference_folder: Any = NO_FILE, with_pictures: Any = False,
    ) -> io.NodeOutput:  # fmt: skip
        asked = checked(
            cls, folder=folder, trigger_word=trigger_word, flip=flip, frames=frames, clips_per_video=clips_per_video,
            reference_folder=reference_folder, with_pictures=with_pictures,
        )  # fmt: skip
        loaded = loaded_folder(**asked, progress=NodeProgress(cls.hidden.unique_id))
        return io.NodeOutput(loaded.images, loaded.texts, loaded.files, loaded.references)


def loaded_folder(
    folder: str,
    trigger_word: str,
    flip: bool,
    frames: int,
    clips_per_video: int,
    reference_folder: str,
    with_pictures: bool,
    progress: NodeProgress,
) -> LoadedFolder:
    """Return the folder's content as asked for, and show on the node anything odd about it.

    Raises:
        InvalidInputError: If the folder cannot be used.
    """
    for name, number in (("frames", frames), ("clips_per_video", clips_per_video)):
        if number < 1:
            raise InvalidInputError(f"`{name}` must be at least 1, got {number}.")
    what = "pictures" if frames == 1 else "videos and pictures" if with_pictures else "videos"
    loaded = load_training_folder(
        folder, lambda done, total: progress(f"loading {what}", done, total), frames=frames, clips=clips_per_video,
        reference_folder=None if reference_folder == NO_FILE else reference_folder, with_pictures=with_pictures,
    )  # fmt: skip
    loaded = with_trigger(loaded, trigger_word)
    loaded = with_mirrored(loaded) if flip else loaded
    captions = sum(map(bool, loaded.texts)) or "none"
    count = f"{what.capitalize()}: {len(loaded.images)}; captions: {captions}"
    count += f"; references: {len(loaded.references)}" if loaded.references else ""
    progress.say("\n".join([*loaded.remarks, count]))
    return loaded
