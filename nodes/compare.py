"""Compare Pictures: two pictures on each other, with a slider between them, on the node.

The page's side is ``web/js/compare_node.js``.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.inputs.pictures import Pictures


class ComparePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_Compare",
            display_name="Compare Pictures (before / after)",
            category="BlockSkip",
            description=(
                "Shows two pictures on each other with a slider between them: the same prompt and seed without and with "
                "a LoRA, or any other two. With several, each is compared with its counterpart."
            ),
            search_aliases=["blockskip", "compare", "slider", "image comparer", "before after", "a b test", "side by side"],
            is_output_node=True,
            is_experimental=True,
            inputs=[
                io.Image.Input("before", tooltip="Shown left of the slider, e.g. sampled without the LoRA."),
                io.Image.Input("after", tooltip="Shown right of the slider, e.g. sampled with the LoRA."),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],  # saved in the pictures, as by core's preview
        )  # fmt: skip

    @classmethod
    def execute(cls, before: Any, after: Any) -> io.NodeOutput:
        require_counterparts(before, after)
        left, right = (
            ui.PreviewImage(images.float(), cls=cls) for images in (before, after)
        )  # numpy knows no bfloat16
        return io.NodeOutput(ui={"blockskip_before": left.values, "blockskip_after": right.values})


def require_counterparts(before: Any, after: Any) -> None:
    """Raise InvalidInputError unless both are pictures, as many of one as of the other."""
    counts = [
        len(Pictures([images], kind=name.capitalize(), input_name=name))
        for name, images in (("before", before), ("after", after))
    ]
    if counts[0] != counts[1]:
        raise InvalidInputError(
            f"`before` has {counts[0]} pictures and `after` has {counts[1]}. Connect as many of one as of the other."
        )
