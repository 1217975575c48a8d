"""BlockSkip: train LoRAs of large diffusion transformers on a small GPU, inside ComfyUI.

The pack's entry point. It does not import ComfyUI, so that tests and packaging tools can import it.
"""

import logging
from typing import Any

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """Return the pack's extension; called by ComfyUI."""
    try:
        from .nodes import BlockSkipExtension
    except Exception:
        logging.getLogger(__name__).exception("BlockSkip: the nodes failed to import")  # the host drops the traceback
        raise
    return BlockSkipExtension()
