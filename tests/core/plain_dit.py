"""A diffusion transformer of plain torch with two kinds of blocks that write into their input, like FLUX's.

Besides the model there is a second, independent way to run it: :func:`reference_denoise`, out of place, with the LoRA
merged into the weights and the skipped spans inserted by hand. The package is compared with that.

Axis legend: ``B`` batch, ``N`` image tokens, ``L`` text tokens, ``D`` model width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig
from blockskip_pack.blockskip_core.data.schedule import Draw, TrainingSchedule
from blockskip_pack.blockskip_core.model import TokenStreams, linear_names
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.source import OpenResiduals
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.torch_dit import TorchDit
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.observer import OnStep
from blockskip_pack.blockskip_core.training.result import TrainingResult
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TEXT_WIDTH, CHANNELS = 8, 2, 7, 3
LATENT_SHAPE = (CHANNELS, 2, 3)  # six image tokens
TEXT_LENGTHS = (5, 5, 4)  # of the captions


def attend(qkv: Tensor) -> Tensor:
    """Softmax attention over (B, tokens, 3 * D), written out."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Separate image and text, ``block(img=, txt=, vec=) -> (img, txt)``; in place."""

    def __init__(self) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_qkv", nn.Linear(WIDTH, 3 * WIDTH))
            self.add_module(f"{stream}_proj", nn.Linear(WIDTH, WIDTH))
            self.add_module(f"{stream}_up", nn.Linear(WIDTH, 12))
            self.add_module(f"{stream}_down", nn.Linear(12, WIDTH))
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(vec)
        qkv = torch.cat((self.txt_qkv(_norm(txt)), self.img_qkv(_norm(img))), dim=1)
        attended = attend(qkv)
        num_text = txt.shape[1]
        img += gate * self.img_proj(attended[:, num_text:])
        img += self.img_down(functional.gelu(self.img_up(_norm(img))))
        txt += gate * self.txt_proj(attended[:, :num_text])
        txt += self.txt_down(functional.gelu(self.txt_up(_norm(txt))))
        return img, txt


class SingleBlock(nn.Module):
    """Joined tokens, text first, ``block(tokens, vec, num_text=) -> tokens``; in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 3 * WIDTH + 10)
        self.narrow = nn.Linear(WIDTH + 10, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, vec: Tensor, num_text: int) -> Tensor:
        qkv, mlp = self.wide(_norm(tokens)).split((3 * WIDTH, 10), dim=-1)
        tokens += self.gate(vec) * self.narrow(torch.cat((attend(qkv), functional.gelu(mlp)), dim=-1))
        return tokens


class Net(nn.Module):
    """The whole model: latents (B, C, H, W), sigmas (B,), text (B, L, TEXT_WIDTH) -> velocity."""

    def __init__(self, num_double: int, num_single: int) -> None:
        super().__init__()
        self.img_in = nn.Linear(CHANNELS, WIDTH)
        self.txt_in = nn.Linear(TEXT_WIDTH, WIDTH)
        self.time_in = nn.Linear(2, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(num_double))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(num_single))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def embed(self, latents: Tensor, sigmas: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vec = self.time_in(torch.stack((sigmas, sigmas.square()), dim=-1))[:, None]
        return self.img_in(latents.flatten(2).mT), self.txt_in(text), vec

    def forward(self, latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        img, txt, vec = self.embed(latents, sigmas, text)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
        tokens = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            tokens = block(tokens, vec, num_text=txt.shape[1])
        return self.head(tokens[:, txt.shape[1] :]).mT.unflatten(2, latents.shape[2:])


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


class DoubleIO:
    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(kwargs["img"], kwargs["txt"])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(*result)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.img, streams.txt


class SingleIO:
    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(args[0][:, kwargs["num_text"] :], args[0][:, : kwargs["num_text"]])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self.entering((result,), kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        assert streams.txt is not None
        return torch.cat((streams.txt, streams.img), dim=1)


class PlainDit(TorchDit):
    """The model as a SkippableDit. Its weights require gradients, like those of hosts."""

    def __init__(self, num_double: int = 2, num_single: int = 3, *, dtype: torch.dtype = torch.float64, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = Net(num_double, num_single).to(dtype)
            texts = [torch.randn(1, length, TEXT_WIDTH, dtype=dtype) for length in TEXT_LENGTHS]
        super().__init__(
            net,
            blocks={"double_blocks": DoubleIO(), "single_blocks": SingleIO()},
            stem=("img_in", "txt_in", "time_in"),
            head=("head",),
            width=WIDTH,
            denoise=denoise,
            captions=texts,
            family="plain",
        )

    @property
    def net(self) -> Any:
        return self.model

    def weights_hash(self) -> str:
        """A hash of every bit of every weight."""
        digest = hashlib.blake2b()
        for name, tensor in self.net.state_dict().items():
            digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def modules_by_name(self) -> dict[str, nn.Module]:
        return dict(self.net.named_modules())


def denoise(net: Net, noisy: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    """The clean estimate of the whole model."""
    return noisy - sigmas.view(-1, 1, 1, 1) * net(noisy, sigmas, text)


# --- the independent reference -----------------------------------------------------------------------------------


def reference_denoise(
    dit: PlainDit,
    noisy: Tensor,
    sigmas: Tensor,
    captions: Sequence[int],
    *,
    selection: BlockSelection | None = None,
    lora: Mapping[str, tuple[Tensor, Tensor, float]] | None = None,
    response: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The clean estimate by plain autograd: no in-place writes, the LoRA merged, the base model's spans inserted.

    ``lora`` maps a layer's name to (A, B, scale) and only acts in the kept blocks; the front's output and the back's
    image residual are those of the model without it. ``response`` is what the back span adds for a change of its input.
    """
    net, lora = dit.net, lora or {}
    text = torch.cat([dit.captions[caption] for caption in captions])

    def linear(name: str, x: Tensor) -> Tensor:
        layer = net.get_submodule(name)
        weight = layer.weight
        if name in lora:
            down, up, scale = lora[name]
            weight = weight + scale * up @ down
        return functional.linear(x, weight, layer.bias)

    def block(name: str, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        gate, num_text = linear(f"{name}.gate", vec), txt.shape[1]
        if name.startswith("double"):
            qkv = torch.cat((linear(f"{name}.txt_qkv", _norm(txt)), linear(f"{name}.img_qkv", _norm(img))), dim=1)
            text_part, image_part = attend(qkv).split((num_text, img.shape[1]), dim=1)
            img = img + gate * linear(f"{name}.img_proj", image_part)
            img = img + linear(f"{name}.img_down", functional.gelu(linear(f"{name}.img_up", _norm(img))))
            txt = txt + gate * linear(f"{name}.txt_proj", text_part)
            txt = txt + linear(f"{name}.txt_down", functional.gelu(linear(f"{name}.txt_up", _norm(txt))))
            return img, txt
        tokens = torch.cat((txt, img), dim=1)
        qkv, mlp = linear(f"{name}.wide", _norm(tokens)).split((3 * WIDTH, 10), dim=-1)
        added = gate * linear(f"{name}.narrow", torch.cat((attend(qkv), functional.gelu(mlp)), dim=-1))
        return img + added[:, num_text:], txt + added[:, :num_text]

    img, txt, vec = net.embed(noisy, sigmas, text)
    back = selection.back if selection else 0
    last = len(dit.blocks) - (selection.tail if selection else 0)  # the first block after the skipped back
    base_img, base_txt, before_back = img, txt, (img, txt)
    for index, info in enumerate(dit.blocks):
        if index == last - back:
            before_back = base_img, base_txt
        base_img, base_txt = _without(lora, block, info.name, base_img, base_txt, vec)
        if selection is not None and index < selection.front:
            img, txt = base_img, base_txt
        elif index < last - back or index >= last:
            img, txt = block(info.name, img, txt, vec)
        elif index == last - 1:
            moved = img - before_back[0].detach()
            img = img + (base_img - before_back[0]).detach()
            img = img if response is None else img + response(moved)
            txt = txt + (base_txt - before_back[1]).detach()
    velocity = linear("head", img).mT.unflatten(2, noisy.shape[2:])
    return noisy - sigmas.view(-1, 1, 1, 1) * velocity


def _without(lora: dict, block, *args) -> tuple[Tensor, Tensor]:
    taken = dict(lora)
    lora.clear()
    try:
        return block(*args)
    finally:
        lora.update(taken)


# --- runs --------------------------------------------------------------------------------------------------------


def schedule(
    sigmas: Sequence[float] = (0.3, 0.9, 0.55, 0.7), captions: Sequence[int] = (0, 1, 0, 1)
) -> TrainingSchedule:
    """A schedule with these draws."""
    draws = tuple(
        Draw(picture=0, caption=caption, sigma=sigma, side=16, top=0, left=0, noise_seed=index + 11)
        for index, (sigma, caption) in enumerate(zip(sigmas, captions, strict=True))
    )
    return TrainingSchedule(draws, PatchConfig(patch_min=16, patch_max=32), 0, "model")


def latents(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Clean latents, shape (count, C, H, W)."""
    return torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5), dtype=dtype)


def selection(front: int, back: int, num_blocks: int = 5, tail: int = 0) -> BlockSelection:
    """A selection for the model of the default size."""
    return BlockSelection(front=front, back=back, num_blocks=num_blocks, family="plain", tail=tail)


def lora_for(
    dit, chosen: BlockSelection, *, zero: bool = True, dtype: torch.dtype = torch.float64, size: float = 0.3,
    wanted=lambda name: not name.endswith("gate"),
) -> LoraAdapters:  # fmt: skip
    """Adapters on linear layers of the kept blocks; with ``zero`` off, B is random."""
    layers = linear_names(dit, chosen, wanted)
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    adapters = LoraAdapters(shapes, LoraSettings(rank=2, alpha=3.0), seed=4, dtype=dtype)
    if not zero:
        generator = torch.Generator().manual_seed(8)
        for name in adapters.names:
            up = adapters.up(name)
            up.data.copy_(torch.randn(up.shape, generator=generator, dtype=dtype) * size)
    return adapters


def lora_tensors(adapters: LoraAdapters) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scale) by layer, as leaves of a separate graph."""
    return {
        name: (
            adapters.down(name).detach().clone().requires_grad_(),
            adapters.up(name).detach().clone().requires_grad_(),
            adapters.scale,
        )
        for name in adapters.names
    }


def all_blocks(dit) -> int:
    """The room that lets all blocks be loaded at once, which takes one pass instead of one per block."""
    return sum(block.num_bytes for block in dit.blocks)


def needed(count: int, *, steps: int = 1, batch_size: int = 1, accumulation: int = 1, **_: object) -> range:
    """The draws among ``count`` that a run with these settings goes through."""
    return range(min(steps * batch_size * accumulation, count))


class MemorySource:
    """Residuals of draws, of all unless told which, precomputed with all blocks loaded at once and held in memory."""

    def __init__(self, dit, chosen, plan, clean, draws=None, **options) -> None:
        options.setdefault("room", all_blocks(dit))
        draws = range(len(plan)) if draws is None else draws
        self.computed = precompute_residuals(dit, plan, clean, chosen, draws, **options)

    def stretches(self, run, start=0):
        yield nullcontext(
            OpenResiduals(range(start, len(run)), self.computed.residuals.__getitem__, self.computed.reference)
        )


def train(
    dit, chosen, source, adapters, *, plan=None, clean=None, on_step=None, config=None, checkpoints=None, offsets=None,
    **settings,
):  # fmt: skip
    """Run a training and return (result, gradients of the last optimiser step before clipping)."""
    plan = plan or schedule()
    clean = latents(len(plan)) if clean is None else clean
    gradients: dict[str, Tensor] = {}
    handles = []
    for name in adapters.names:
        for part, parameter in (("A", adapters.down(name)), ("B", adapters.up(name))):
            key = f"{name}.{part}"
            handles.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda p, key=key: gradients.__setitem__(key, p.grad.clone())
                )
            )
    result = TrainingResult()
    config = config or TrainingConfig(**{"steps": 1, "learning_rate": 1e-2, **settings})
    try:
        train_lora(
            dit,
            plan,
            clean,
            chosen,
            source,
            adapters,
            config,
            result=result,
            checkpoints=checkpoints,
            offsets=offsets,
            observers=[OnStep(on_step)] if on_step else (),
        )
    finally:
        for handle in handles:
            handle.remove()
    return result, gradients
