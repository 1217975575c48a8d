"""A small vision encoder as the host holds one: loaded by its model management, called like its CLIP_VISION."""

from __future__ import annotations

import torch


class QuadrantEncoder:
    """Embeds a picture as the colours of its quarters."""

    model_type = "clip_vision_model"

    def __init__(self) -> None:
        import comfy.model_patcher

        cpu = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(3, 3), cpu, cpu)
        self.encoded = 0

    def encode_image(self, image: torch.Tensor) -> dict:
        import comfy.model_management

        comfy.model_management.load_model_gpu(self.patcher)
        self.encoded += len(image)
        quarters = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1).double(), 2)
        return {"image_embeds": quarters.flatten(1), "last_hidden_state": None}

    @property
    def is_loaded(self) -> bool:
        """Whether the host has it in its list of loaded models."""
        import comfy.model_management

        return any(loaded.model is self.patcher for loaded in comfy.model_management.current_loaded_models)
