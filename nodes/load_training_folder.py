"""Load Training Folder: loads pictures and their captions, whichever program wrote them."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.hosts.inputs.folder_variants import with_mirrored, with_trigger
from ..blockskip_core.hosts.inputs.training_folder import LoadedFolder, folder_identity, load_training_folder
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
                "Loads pictures and their captions from a folder in ComfyUI's input folder. Reads text files in any "
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
    def execute(cls, folder: Any, trigger_word: Any = "", flip: Any = False) -> io.NodeOutput:
        asked = checked(cls, folder=folder, trigger_word=trigger_word, flip=flip)
        loaded = loaded_folder(**asked, progress=NodeProgress(cls.hidden.unique_id))
        return io.NodeOutput(loaded.images, loaded.texts, loaded.files)


def loaded_folder(folder: str, trigger_word: str, flip: bool, progress: NodeProgress) -> LoadedFolder:
    """Return the folder's content as asked for, and show on the node anything odd about it.

    Raises:
        InvalidInputError: If the folder cannot be used.
    """
    loaded = load_training_folder(folder, lambda done, total: progress("loading pictures", done, total))
    loaded = with_trigger(loaded, trigger_word)
    loaded = with_mirrored(loaded) if flip else loaded
    captions = sum(map(bool, loaded.texts)) or "none"
    progress.say("\n".join([*loaded.remarks, f"Pictures: {len(loaded.images)}; captions: {captions}"]))
    return loaded
