"""One cell of the card benchmark, in a separate process: a model's whole run through the nodes, on an emulated card.

Takes a cell as JSON and a folder for counts, and prints the measurements as one line of JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
CPU = torch.device("cpu")
TINY = "tiny FLUX"  # not published: for a quick check, and for the comparison with a card that has data
WEIGHTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SMALLEST = 8.0  # GiB
STEPS, DRAWS, CHUNK, RANK, TEXT_TOKENS, CROP = 2, 2, 64, 16, 512, 256
BACK = "constant"  # the paper's: its memory is what the tables compare


@dataclass(frozen=True)
class Cell:
    """What to run.

    Attributes:
        model: A name of ``published_sizes``, or :data:`TINY`.
        weights: The format in which they are loaded, see :data:`WEIGHTS`.
        card: GiB of the card.
        paged: Whether ComfyUI pages weights in and out (dynamic VRAM, its default on NVIDIA cards) instead of loading
            models.
        with_bytes: Whether the card's tensors have data, so that it computes; only for models that fit into host
            memory.
    """

    model: str
    weights: str
    card: float
    paged: bool = False
    with_bytes: bool = False

    @property
    def streams(self) -> bool:
        """Whether to run it with streamed weights too: where this matters, and where the host has a choice."""
        return self.card <= SMALLEST and not self.paged


def seen_in(cell: Cell, folder: Path, comfyui: Path, counts: Path | None = None) -> dict[str, Any]:
    """Run a cell and return the measurements in bytes; ComfyUI must not have been imported before.

    Args:
        cell: What to run.
        folder: An empty folder for the nodes' files.
        comfyui: ComfyUI's folder.
        counts: Folder for counts that other cells can reuse, see :func:`remember_counts`.
    """
    card = installed_card(cell, comfyui)
    if counts is not None:
        remember_counts(cell, counts)
    from command_line import about

    with Bench(cell, card, folder) as bench:
        plan = bench.plan()
        row = {**asdict(cell), "about": about(), "others": bench.others, "selection": bench.chosen(), "plan": plan.seen}
        row["precompute"], residuals = bench.precompute(plan)
        row["resident"] = bench.train(plan, residuals, "resident")
        if cell.streams:
            row["streamed"] = bench.train(plan, residuals, "streamed")
    return row


def installed_card(cell: Cell, comfyui: Path) -> Any:
    """Return the emulated card, with ComfyUI and the pack on it."""
    sys.path.insert(0, str(ROOT))
    from devtools.card import Card
    from devtools.card import comfyui as host
    from devtools.card.shapes import ShapesCard

    kind = Card if cell.with_bytes else ShapesCard
    card = kind(round(cell.card * GIB), name=f"Emulated card of {cell.card:g} GiB").install()
    from quality_world import use_pack

    use_pack(comfyui)
    host.disable_kernels()
    return card


def remember_counts(cell: Cell, folder: Path) -> None:
    """Reuse Memory Plan's counts for all cards: they do not depend on the card, and take most of a cell's time."""
    from blockskip_pack.blockskip_core.hosts.models import counted_run

    count = counted_run.memory_needs

    def remembered(dit: Any, plan: Any, weights: Any, once: Any) -> Any:
        settings = {name: value for name, value in vars(plan).items() if name != "layers"}
        key = repr((cell.model, cell.weights, settings, sorted(plan.layers), weights))
        file = folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if not file.is_file():
            file.write_bytes(pickle.dumps(count(dit, plan, weights, once)))
        return pickle.loads(file.read_bytes())

    counted_run.memory_needs = remembered


def loaded_model(cell: Cell) -> Any:
    """Return the host's MODEL with weights that are zeros and take no memory, or random on a card that computes."""
    import comfy.model_management
    import comfy.model_patcher
    from blockskip_pack.blockskip_core.hosts.families import published_sizes

    from devtools.card.shapes import zero

    if cell.model == TINY:
        flux = published_sizes.PUBLISHED_SIZES["FLUX.1-dev"]
        small = {**flux.config, "hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 4}
        published_sizes.PUBLISHED_SIZES = {TINY: replace(flux, config=small)}
    dtype = WEIGHTS[cell.weights]
    model = published_sizes.published_model(cell.model, dtype, torch.bfloat16 if dtype.itemsize < 2 else None, CPU)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(std=0.05) if cell.with_bytes else zero(tensor)
    on_card = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=on_card, offload_device=CPU)


def give_layout(cell: Cell, patcher: Any, caption: list) -> None:
    """Tell the host how a followed model's blocks take their tokens, because one without values cannot be followed."""
    from blockskip_pack.blockskip_core.hosts.models import hosted_dit
    from memory_followed import is_followed, layout_of

    if cell.model != TINY and is_followed(cell.model):
        channels = patcher.model.latent_format.latent_channels
        hosted_dit._LAYOUTS[patcher.model.diffusion_model] = layout_of(cell.model, caption, channels)


def caption_for(name: str) -> list:
    """Return a conditioning of ones with the shape that the model's text encoder would give."""
    from memory_arms import FAMILIES, FLUX

    width = {TINY: FLUX.text_width, **{family.name: family.text_width for family in FAMILIES}}[name]
    return [[torch.ones(1, TEXT_TOKENS, width), {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]


class NoVae:
    """Replaces a model's VAE; returns zeros of the right shape."""

    def __init__(self, model: Any) -> None:
        self._format = model.latent_format
        self.first_stage_model = torch.nn.Linear(1, 1)

    def spacial_compression_encode(self) -> int:
        """Return the pixels per cell."""
        return self._format.spacial_downscale_ratio

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return latents of pictures (B, H, W, 3)."""
        rows, columns = (side // self.spacial_compression_encode() for side in pixels.shape[1:3])
        frames = (1,) if self._format.latent_dimensions == 3 else ()
        return torch.zeros(len(pixels), self._format.latent_channels, *frames, rows, columns)


@dataclass(frozen=True)
class Plan:
    """The result of Memory Plan.

    Attributes:
        settings: Its output ``settings``.
        needs: The counted needs of a run with them.
        streamed: Bytes of weights that are on the card at the same time if all are streamed, counted.
        seen: Values for the row.
    """

    settings: Any
    needs: Any
    streamed: int
    seen: dict[str, Any]


class Peaks:
    """The most bytes of the card used by us, by stage.

    Attributes:
        bytes: Stage -> bytes.
        stage: The current stage.
    """

    def __init__(self, memory: Any, used: int, others: int) -> None:
        self.stage, self.bytes = "passes", {"passes": used}
        self._memory, self._others = memory, others
        memory.on_take = self._look

    def _look(self, taken: int) -> None:
        self.bytes[self.stage] = max(self.bytes.get(self.stage, 0), self._memory.used - self._others)


class Bench:
    """A model, the nodes, and the card that they run on.

    Args:
        cell: What to run.
        card: The emulated card, with ComfyUI on it.
        folder: An empty folder for the nodes' files.

    Attributes:
        side, sides: Smallest and largest side in pixels of a training crop.
        back: How the last skipped blocks are replaced, see Precompute Residuals.
    """

    side, sides, back = CROP, 2 * CROP, BACK

    def __init__(self, cell: Cell, card: Any, folder: Path) -> None:
        import folder_paths
        from blockskip_pack import nodes
        from blockskip_pack.blockskip_core.accounting.plan import RESERVED
        from blockskip_pack.blockskip_core.hosts.models import quantised_blocks

        if not cell.with_bytes:  # without data, formats cannot be tried on this card
            quantised_blocks._works_on = lambda weight_format, device: True
        self.nodes, self.memory = nodes, card.memory
        share, more = RESERVED
        self.others = round(card.memory.total * share + more * GIB)
        card.memory.take(self.others)
        (folder / "loras").mkdir()
        folder_paths.output_directory = folder_paths.temp_directory = str(folder)
        folder_paths.folder_names_and_paths["loras"] = ([str(folder / "loras")], {".safetensors"})
        with torch.inference_mode():  # as the host loads
            self.model = loaded_model(cell)
        self._host, self._pager = ExitStack(), None
        if cell.paged:
            import comfy.model_management

            from devtools.card import comfyui as host
            from devtools.card.pages import FULL_PAGE

            comfy.model_management.MAX_PINNED_MEMORY = 0  # pinned copies of all weights would need real memory
            self._pager = self._host.enter_context(host.dynamic_vram(card, page=FULL_PAGE))
            self.model = host.as_dynamic(self.model)
        self.caption = caption_for(cell.model)
        give_layout(cell, self.model, self.caption)
        self.selection = self.select()

    def __enter__(self) -> Bench:
        gc.freeze()  # every measurement collects garbage, and looks at nothing that was imported
        return self

    def __exit__(self, *error: object) -> None:
        self._host.close()

    def select(self) -> Any:
        """Choose half of the blocks, as the paper does."""
        return self._run("SelectBlocks", positive=self.caption, method="preset", skip_ratio=0.5, front=0, back=0)[0]

    def chosen(self) -> tuple[int, int, int]:
        """Return the numbers of blocks skipped at the front and at the back, and of all blocks."""
        return self.selection.front, self.selection.back, self.selection.num_blocks

    def plan(self) -> Plan:
        """Get settings from Memory Plan that fit the free memory and use what is left; count what they need."""
        from blockskip_pack.blockskip_core.accounting.plan import fits, peak_of

        text, as_set, _, settings = self._run(
            "MemoryPlan", positive=self.caption, selection=self.selection, patch_min=self.side, draws=DRAWS, storage="disk",
            rank=RANK, batch_size=1, checkpointing=True, quantize_kept="off", activation_budget=0.0,
            card_memory=self.memory.free() / GIB, chunk_size=CHUNK, back_residual=self.back,
        ).args  # fmt: skip
        needs, streamed = self.counted(settings)
        seen = {
            "fits": as_set, "keeps_all": as_set and not settings.config.checkpointing, "settings_fit": fits(peak_of(settings, needs), self.memory.free()),
            "says": text.splitlines()[0], "settings": settings.describe(),
        }  # fmt: skip
        return Plan(settings, needs, streamed, seen)

    def counted(self, settings: Any) -> tuple[Any, int]:
        """Count the needs of a run with such settings, and the bytes of weights on the card if all are streamed."""
        from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
        from blockskip_pack.blockskip_core.hosts.inputs.frames import latent_shape
        from blockskip_pack.blockskip_core.hosts.models.counted_run import CountedRun
        from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

        dit = HostedDit(self.model, [self.caption], latent_shape(self.model.model, settings.patch_min))
        run = CountedRun(
            dit, self.selection, LoraSettings(rank=RANK, alpha=RANK), captions=1, draws=DRAWS, chunk_size=CHUNK
        )
        return run.needs(settings), run.streamed_bytes(settings)

    def precompute(self, plan: Plan) -> tuple[dict[str, Any], Any]:
        """Precompute a few examples to disk; return the measurements and the residuals."""
        counted = plan.needs.precomputing
        seen: dict[str, Any] = {"counted": counted.peak if counted else 0, "counted_host": plan.needs.host}
        with self._watched(seen):
            residuals = self._run(
                "PrecomputeResiduals", vae=NoVae(self.model.model), images=torch.rand(1, self.sides, self.sides, 3),
                positive=self.caption, selection=self.selection, draws=DRAWS, patch_min=self.side, patch_max=self.sides,
                storage="disk", seed=0, back_residual=self.back, memory_settings=plan.settings,
            )[0]  # fmt: skip
        return {**seen, "left": self._used()}, residuals

    def train(self, plan: Plan, residuals: Any, placement: str) -> dict[str, Any]:
        """Train a few steps; return the measurements, or why the run was refused."""
        from blockskip_pack.blockskip_core.errors import BlockSkipError

        counted = plan.needs.training
        seen: dict[str, Any] = {
            "counted": counted.peak, "weights": counted.weights, "counted_saved": counted.saved,
            "counted_host": plan.needs.host,
        }  # fmt: skip
        if placement == "streamed":
            seen["counted"] += plan.streamed - counted.weights  # as in Memory Plan's verdict
        try:
            with self._watched_steps(seen):
                summary = self._run(
                    "TrainLora", residuals=residuals, steps=STEPS, learning_rate=1e-4, rank=RANK, seed=0, resume=False,
                    memory_settings=plan.settings, kept_weights=placement, output_name=f"loras/{placement}",
                ).ui["blockskip"][0]  # fmt: skip
            seen.update(
                said_peak=summary["peak_memory_bytes"] - self.others,  # too high if paged: torch counts pages here
                saved=summary["saved_for_backward_bytes"],
                problems=summary["problems"],
            )  # fmt: skip
        except (BlockSkipError, torch.OutOfMemoryError) as error:
            seen["refused"] = str(error)
        return {**seen, "left": self._used()}

    @contextmanager
    def _watched(self, seen: dict[str, Any]) -> Iterator[Peaks]:
        """Record the peaks on the card, and of host memory besides the loaded model."""
        from blockskip_pack.blockskip_core.accounting.measuring import Counting

        peaks = Peaks(self.memory, self._used(), self.others)
        with Counting() as counting:
            counting.hold(list(self.model.model.parameters()))
            loaded = counting.live(CPU)
            try:
                yield peaks
            finally:
                seen.update(peaks.bytes, peak=max(peaks.bytes.values()), host=counting.peak(CPU) - loaded)

    @contextmanager
    def _watched_steps(self, seen: dict[str, Any]) -> Iterator[None]:
        """Like :meth:`_watched`, with optimiser steps separate; also record where the weights are at the last one."""

        def before(optimizer: Any, args: tuple, kwargs: dict) -> None:
            if optimizer.param_groups[0]["params"][0].is_cuda:  # not when the trainer counts a run without weights
                seen["resident"], seen["offloaded"] = self._weights()
                peaks.stage = "optimiser"

        def after(optimizer: Any, args: tuple, kwargs: dict) -> None:
            peaks.stage = "passes"

        with self._watched(seen) as peaks:
            hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def _weights(self) -> tuple[int, int]:
        """Return the bytes of the loaded model's weights on the card and in host memory, counting whole pages."""
        import comfy.model_management
        from blockskip_pack.blockskip_core.accounting.weight_formats import stored_bytes

        (loaded,) = comfy.model_management.current_loaded_models
        tensors = (*loaded.model.model.parameters(), *loaded.model.model.buffers())
        num_bytes = {"cuda": 0, "cpu": 0}
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            num_bytes[tensor.device.type] += stored_bytes(tensor)
        paged = sum(model.loaded_size() for model in self._pager.models) if self._pager else 0
        return num_bytes["cuda"] + paged, max(0, num_bytes["cpu"] - paged)

    def _used(self) -> int:
        """Return the bytes of the card used by us, after collecting unreachable objects."""
        return self.memory.settled() - self.others

    def _run(self, node: str, **inputs: Any) -> Any:
        """Run a node as the host does: in a locked clone of its class, on lists, under inference mode."""
        from comfy_api.latest import io

        hidden = {io.Hidden.unique_id: "1", io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: None}
        clone = getattr(self.nodes, node).PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
        listed = {name: [value] for name, value in {"model": self.model, **inputs}.items()}
        with torch.inference_mode():
            return clone.EXECUTE_NORMALIZED(**listed)


def main() -> None:
    """Run the cell given on the command line, optionally followed by the folder of counts."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        cell, counts = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2]) if len(sys.argv) > 2 else None
        row = seen_in(cell, Path(folder), Path(os.environ["COMFYUI_PATH"]), counts)
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
