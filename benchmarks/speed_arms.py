"""The arms to time: core's trainer, a plain LoRA, this package in many settings, precomputing, plain forwards."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from blockskip_pack.blockskip_core.accounting.step_estimate import estimated_step_bytes
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.blocks.out_of_place import OutOfPlace
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.hosts.inputs.conditioning import model_arguments
from blockskip_pack.blockskip_core.model import linear_names
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.residuals.sources import DiskSource, FoldedSource
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.result import TrainingResult
from speed_model import Lab, settle, timed
from speed_processes import PROCESSES, process_name, process_steps
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RATIOS = (0.0, 0.3, 0.4, 0.5)
LEARNING_RATE = 1e-4
WARM_UP = 1  # steps that are not counted
CORE, PLAIN, OURS, PREPARE = "ComfyUI's Train LoRA", "plain LoRA (peft)", "BlockSkip", "precomputing"
TOGETHER = "several processes"


class NotHere(RuntimeError):
    """An arm that makes no sense on this machine."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        part: The trainer that it belongs to.
        name: Unique readable name.
        size: Pixels per side.
        run: ``(lab, count) -> seconds`` of each counted step (or of each draw, for precomputing).
        unit: The unit that the seconds are for.
        times: Factor for the number of counted steps, for arms whose ratio has a narrow target.
    """

    part: str
    name: str
    size: int
    run: Callable[[Lab, int], list[float]]
    unit: str = "step"
    times: int = 1


def ours_name(ratio: float, size: int, checkpointing: bool, source: str = "") -> str:
    """Return the name of one of our arms."""
    how = "checkpointing" if checkpointing else "no checkpointing"
    return f"{ratio:.0%} skipped, {size} px, {how}" + (f", {source}" if source else "")


def core_name(size: int, what: str) -> str:
    """Return the name of one of core's arms."""
    return f"Train LoRA, {size} px, {what}"


def plain_name(size: int, checkpointing: bool) -> str:
    """Return the name of one of the plain LoRA's arms."""
    return f"plain LoRA, {size} px, {'checkpointing' if checkpointing else 'no checkpointing'}"


def forward_name(size: int) -> str:
    """Return the name of the plain forward's arm."""
    return f"plain forward of the whole model, {size} px"


def precompute_name(size: int) -> str:
    """Return the name of the precomputing arm."""
    return f"precompute and write, 50% skipped, {size} px"


def all_arms(large: int, small: int) -> list[Arm]:
    """Return all arms in the order of the table; arms that are compared are next to each other."""
    arms = [
        Arm(CORE, core_name(large, what), large, partial(core_steps, size=large, **settings))
        for what, settings in CORE_SETTINGS.items()
    ]
    arms.append(Arm(CORE, core_name(small, "checkpointing"), small, partial(core_steps, size=small)))
    for size in (large, small):
        arms += [
            Arm(PLAIN, plain_name(size, on), size, partial(plain_steps, size=size, checkpointing=on))
            for on in (False, True)
        ]
    for size in (large, small):
        for ratio in RATIOS:
            for on in (False, True):
                run = partial(our_steps, size=size, ratio=ratio, checkpointing=on)
                arms.append(
                    Arm(OURS, ours_name(ratio, size, on), size, run, times=3 if (ratio, on) == (0.5, True) else 1)
                )
        for source in ("from disk", "on the fly"):
            run = partial(our_steps, size=size, ratio=0.5, checkpointing=True, source=source)
            arms.append(
                Arm(OURS, ours_name(0.5, size, True, source), size, run, times=3 if source == "from disk" else 1)
            )
    arms.append(
        Arm(OURS, ours_name(0.0, large, True, "weights streamed"), large,
            partial(our_steps, size=large, ratio=0.0, checkpointing=True, source="weights streamed"))
    )  # fmt: skip
    for size in (large, small):
        arms.append(Arm(PREPARE, forward_name(size), size, partial(plain_forwards, size=size), "draw"))
        arms.append(Arm(PREPARE, precompute_name(size), size, partial(precomputed_draws, size=size), "draw"))
    for processes in PROCESSES:
        run = partial(process_steps, size=small, processes=processes)
        arms.append(Arm(TOGETHER, process_name(processes, small), small, run, "example"))
    return arms


# --- core's trainer ----------------------------------------------------------------------------------------------

CORE_SETTINGS: dict[str, dict[str, Any]] = {
    "checkpointing": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "checkpointing, offloading": {"offloading": True},
    "checkpointing, bypass mode": {"bypass_mode": True},
    "no checkpointing, bypass mode": {"bypass_mode": True, "gradient_checkpointing": False},
}


def core_steps(lab: Lab, count: int, *, size: int, **changes: Any) -> list[float]:
    """Time core's node, called with lists and under inference mode as ComfyUI calls it.

    Its progress bar reports when a step is done, but at most ten times a second; so the time for each step is the mean
    of all but the first.
    """
    from comfy_extras.nodes_train import TrainLoraNode

    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[lab.dtype]
    settings = {
        "batch_size": 1, "steps": WARM_UP + count, "grad_accumulation_steps": 1, "learning_rate": LEARNING_RATE,
        "rank": lab.rank, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": dtype,
        "lora_dtype": dtype, "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": False, **changes,
    }  # fmt: skip
    latents = {"samples": lab.latents(size)}
    with _step_times() as done, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU autocast warns about float32
        TrainLoraNode.execute(
            model=[lab.patcher], latents=[latents], positive=[lab.caption], **{k: [v] for k, v in settings.items()}
        )
    seconds = (done[-1][1] - done[0][1]) / (done[-1][0] - done[0][0])
    return [seconds] * count


@contextmanager
def _step_times() -> Iterator[list[tuple[int, float]]]:
    """Collect (steps done, time) from the host's progress bar; restore its previous hook."""
    import comfy.utils

    times: list[tuple[int, float]] = []
    hook, bars = comfy.utils.PROGRESS_BAR_HOOK, comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_global_hook(lambda done, *rest, **named: times.append((done, time.perf_counter())))
    comfy.utils.set_progress_bar_enabled(False)
    try:
        yield times
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
        comfy.utils.set_progress_bar_enabled(bars)


# --- a plain LoRA ------------------------------------------------------------------------------------------------


def plain_steps(lab: Lab, count: int, *, size: int, checkpointing: bool) -> list[float]:
    """Time peft's own LoRA on all blocks of the host's model; the same layers, rank and optimiser as ours."""
    import comfy.model_management as management
    import peft

    patcher = lab.patcher.cached_patcher_init[0](disable_dynamic=True)
    adapter = lab.hosted(size).adapter
    blocks = [patcher.model.diffusion_model.get_submodule(info.name) for info in lab.hosted(size).blocks]
    management.load_models_gpu([patcher], force_full_load=True)
    targets = [
        name
        for name, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(("double_blocks.", "single_blocks."))
        and adapter.is_lora_target(name, "attention and mlp")
    ]
    config = peft.LoraConfig(r=lab.rank, lora_alpha=lab.rank, target_modules=targets)
    peft.inject_adapter_in_model(config, patcher.model.diffusion_model)
    for block in blocks:
        block.forward = partial(_guarded, block.forward, checkpointing)
    parameters = [p for p in patcher.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    step = _PlainStep(lab, size, patcher.model, patcher.load_device)
    was_training = management.in_training
    try:
        management.in_training = True
        numbers = range(WARM_UP + count)
        return [timed(partial(step, number, parameters, optimizer)) for number in numbers][WARM_UP:]
    finally:
        management.in_training = was_training


def _guarded(forward: Callable[..., Any], checkpointing: bool, *args: Any, **kwargs: Any) -> Any:
    """Run a block out of place, because its in-place additions would make autograd raise."""

    def run(*inner: Any, **named: Any) -> Any:
        with OutOfPlace():
            return forward(*inner, **named)

    if not checkpointing:
        return run(*args, **kwargs)
    if "transformer_options" in kwargs:
        kwargs["transformer_options"] = dict(kwargs["transformer_options"])  # the host writes into it between blocks
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _PlainStep:
    """One training step of a model of the host, with none of our code except the loss."""

    def __init__(self, lab: Lab, size: int, model: Any, device: torch.device) -> None:
        self.schedule, self.latents, self.device, self.model = lab.schedule(size), lab.latents(size), device, model
        self.arguments = model_arguments(model, lab.caption, self.latents[:1], device)

    def denoised(self, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the clean estimate of one draw, with the true latent and the noise level."""
        noisy, clean, sigmas = (x.to(self.device) for x in noisy_batch(self.schedule, self.latents, [draw]))
        return self.model.apply_model(noisy, sigmas, transformer_options={}, **self.arguments), clean, sigmas

    def __call__(self, number: int, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        loss = velocity_loss(*self.denoised(number % len(self.schedule))).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# --- this package ------------------------------------------------------------------------------------------------


def our_steps(
    lab: Lab, count: int, *, size: int, ratio: float, checkpointing: bool, source: str = "in memory"
) -> list[float]:
    """Time the package's own training loop, called as the trainer node calls it."""
    dit, selection = lab.hosted(size), lab.selection(ratio)
    if source == "weights streamed" and dit.device.type == "cpu":
        raise NotHere("This needs a GPU: on a CPU all weights are in its memory anyway.")
    adapters = our_adapters(lab, dit, selection)
    config = TrainingConfig(steps=WARM_UP + count, learning_rate=LEARNING_RATE, checkpointing=checkpointing)
    result = TrainingResult()
    with _residuals(lab, dit, size, ratio, source) as residuals:
        train_lora(
            dit,
            lab.schedule(size),
            lab.latents(size),
            selection,
            residuals,
            adapters,
            config,
            result=result,
            activation_bytes=_step_bytes(lab, dit, size, selection, checkpointing, source, adapters.num_parameters),
        )
    return result.step_seconds[WARM_UP:]


def our_adapters(lab: Lab, dit: Any, selection: Any) -> LoraAdapters:
    """Return a LoRA on the kept blocks' attention and MLP layers."""
    layers = linear_names(dit, selection, lambda name: dit.adapter.is_lora_target(name, "attention and mlp"))
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    return LoraAdapters(shapes, LoraSettings(rank=lab.rank, alpha=lab.rank), seed=0)


@contextmanager
def _residuals(lab: Lab, dit: Any, size: int, ratio: float, source: str) -> Iterator[Any]:
    if source == "on the fly":
        yield FoldedSource()
    elif source == "from disk":
        stored = lab.residual_set(size, ratio)
        try:
            yield DiskSource(stored, dit, lambda phase, done, total: None)
        finally:
            shutil.rmtree(stored.folder, ignore_errors=True)
    else:
        yield lab.in_memory(size, ratio)


def _step_bytes(
    lab: Lab, dit: Any, size: int, selection: Any, checkpointing: bool, source: str, lora_numbers: int
) -> int:
    """Return the bytes that the host should keep free; if it is everything, the weights stay in main memory."""
    if source == "weights streamed":
        import comfy.model_management

        return comfy.model_management.get_total_memory(dit.device)
    return estimated_step_bytes(
        num_kept=len(selection.kept),
        tokens=dit.image_tokens(*lab.latents(size).shape[-2:]) + lab.shape.text_tokens,
        width=dit.width,
        itemsize=lab.dtype.itemsize,
        batch_size=1,
        checkpointing=checkpointing,
        lora_numbers=lora_numbers,
    )


# --- precomputing ------------------------------------------------------------------------------------------------


def plain_forwards(lab: Lab, count: int, *, size: int) -> list[float]:
    """Time the host's own forward of the same draws, without loading; seconds per draw."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([lab.patcher])
    step = _PlainStep(lab, size, lab.patcher.model, lab.patcher.load_device)

    def all_draws() -> None:
        with torch.inference_mode():
            for draw in range(lab.draws):
                step.denoised(draw)

    with torch.inference_mode():
        step.denoised(0)
    return [timed(all_draws) / lab.draws for _ in range(count)]


def precomputed_draws(lab: Lab, count: int, *, size: int) -> list[float]:
    """Time what Precompute Residuals does after encoding, including loading and writing."""
    stored = lab.residual_set(size, 0.5)
    dit = lab.hosted(size)
    seconds = []
    for _ in range(count):
        settle()
        shutil.rmtree(stored.folder, ignore_errors=True)
        seconds.append(timed(lambda: write_cache(stored, dit, lambda phase, done, total: None)) / lab.draws)
    shutil.rmtree(stored.folder, ignore_errors=True)
    return seconds
