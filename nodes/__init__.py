"""The pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accept_embeddings import AcceptEmbeddings
from .apply_lora import ApplyLora
from .compare import ComparePictures
from .dynamic_patches import DynamicPatchesNode
from .load_patch_adapters import LoadPatchAdapters
from .load_training_folder import LoadTrainingFolder
from .memory_plan import MemoryPlan
from .page.live_chart import add_routes
from .precompute_residuals import PrecomputeResiduals
from .ralu_sampler import RaluSampler
from .sample_while_training import SampleWhileTraining
from .select_blocks import SelectBlocks
from .train_lora import TrainLora
from .train_patch_adapters import TrainPatchAdapters
from .train_word import TrainWord
from .write_run import WriteRun

NODE_CLASSES: list[type[io.ComfyNode]] = [
    SelectBlocks,
    MemoryPlan,
    PrecomputeResiduals,
    SampleWhileTraining,
    TrainLora,
    ApplyLora,
    ComparePictures,
    RaluSampler,
    LoadTrainingFolder,
    TrainWord,
    AcceptEmbeddings,
    TrainPatchAdapters,
    LoadPatchAdapters,
    DynamicPatchesNode,
    WriteRun,
]


class BlockSkipExtension(ComfyExtension):
    """The extension that ComfyUI loads the nodes from."""

    async def on_load(self) -> None:
        """Serve the latest runs and their summaries to the chart on the trainer's node."""
        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return list(NODE_CLASSES)
