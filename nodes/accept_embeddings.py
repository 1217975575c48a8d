"""CLIP with Embeddings: lets every text encoder read embedding files in prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..blockskip_core.hosts.words.encoders import taking_embedding_files
from .inputs import connected


class AcceptEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_AcceptEmbeddings",
            display_name="CLIP with Embeddings",
            category="BlockSkip/training",
            description=(
                "Lets a text encoder read embedding:NAME in prompts, also those for which ComfyUI has that turned off "
                "(Qwen-Image, Wan). Others pass through unchanged."
            ),
            search_aliases=["blockskip", "embedding", "textual inversion", "zoodip", "qwen", "wan"],
            is_experimental=True,
            inputs=[io.Clip.Input("clip", tooltip="The text encoder; it is not changed.")],
            outputs=[
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="For CLIP Text Encode with embedding:NAME in the text."
                )
            ],
        )

    @classmethod
    def execute(cls, clip: Any) -> io.NodeOutput:
        return io.NodeOutput(taking_embedding_files(connected(clip=clip)["clip"]))
