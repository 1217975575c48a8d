"""ComfyUI node of the BlockSkip demo world: load its word-level text encoder as a CLIP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def load_text_encoder(path: str) -> Any:
    """Return a real ``comfy.sd.CLIP`` around the demo world's words."""
    import comfy.sd
    import folder_paths

    from .embeddings import EncoderWithEmbeddings, TokenizerWithEmbeddings
    from .words import read_text_file

    tables, tokenizer_data = read_text_file(path)
    target = SimpleNamespace(params={}, clip=EncoderWithEmbeddings, tokenizer=TokenizerWithEmbeddings)
    parameters = sum(table.numel() for table in tables.values())
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=tokenizer_data,
        parameters=parameters,
        state_dict=[tables],
        disable_dynamic=True,
    )


class LoadTextEncoder:
    """Load Demo World Text Encoder."""

    DESCRIPTION = (
        "Loads the word-level text encoder of the BlockSkip demo world, for use with its small FLUX model."
    )
    CATEGORY = "BlockSkip/demo"
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("The text encoder: use it wherever a CLIP goes.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Define one input, a choice of the files in the text encoder folders."""
        import folder_paths

        files = folder_paths.get_filename_list("text_encoders")
        tooltip = "The demo world's text file, blockskip_world_text.safetensors."
        return {"required": {"text_file": (files, {"tooltip": tooltip})}}

    def load(self, text_file: str) -> tuple[Any]:
        """Find the file among ComfyUI's text encoders and load it."""
        import folder_paths

        return (load_text_encoder(folder_paths.get_full_path_or_raise("text_encoders", text_file)),)


NODE_CLASS_MAPPINGS = {"BlockSkipDemo_LoadTextEncoder": LoadTextEncoder}
NODE_DISPLAY_NAME_MAPPINGS = {"BlockSkipDemo_LoadTextEncoder": "Load Demo World Text Encoder"}
