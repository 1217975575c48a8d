"""Load Training Folder: loads pictures or videos with their captions, whichever program wrote them."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.inputs.folder_variants import with_mirrored, with_trigger
from ..blockskip_core.hosts.inputs.training_folder import LoadedFolder, folder_identity, load_training_folder
from . import widgets
from .inputs import checked
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
                    "Empty: captions stay as they are.",
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
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, **_others: Any) -> str:
        """Run again when a file of the folder has changed."""
        return folder_identity(folder) if isinstance(folder, str) else ""

    @classmethod
    def execute(
        cls, folder: Any, trigger_word: Any = "", flip: Any = False, frames: Any = 1, clips_per_video: Any = 1
    ) -> io.NodeOutput:
        asked = checked(
            cls, folder=folder, trigger_word=trigger_word, flip=flip, frames=frames, clips_per_video=clips_per_video
        )
        loaded = loaded_folder(**asked, progress=NodeProgress(cls.hidden.unique_id))
        return io.NodeOutput(loaded.images, loaded.texts, loaded.files)


def loaded_folder(
    folder: str, trigger_word: str, flip: bool, frames: int, clips_per_video: int, progress: NodeProgress
) -> LoadedFolder:
    """Return the folder's content as asked for, and show on the node anything odd about it.

    Raises:
        InvalidInputError: If the folder cannot be used.
    """
    for name, number in (("frames", frames), ("clips_per_video", clips_per_video)):
        if number < 1:
            raise InvalidInputError(f"`{name}` must be at least 1, got {number}.")
    what = "pictures" if frames == 1 else "videos"
    loaded = load_training_folder(
        folder, lambda done, total: progress(f"loading {what}", done, total), frames=frames, clips=clips_per_video
    )
    loaded = with_trigger(loaded, trigger_word)
    loaded = with_mirrored(loaded) if flip else loaded
    captions = sum(map(bool, loaded.texts)) or "none"
    progress.say("\n".join([*loaded.remarks, f"{what.capitalize()}: {len(loaded.images)}; captions: {captions}"]))
    return loaded
