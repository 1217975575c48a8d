"""BlockSkip: teach a large diffusion transformer your own subject on a small GPU, inside ComfyUI.

The door of the pack. It imports nothing of ComfyUI, so that tests and packaging tools can import it.
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
