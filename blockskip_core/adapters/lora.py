"""Low-rank adapters on a model's linear layers, without touching the layers.

    y = W x + (alpha / r) B A x            arXiv 2106.09685, Eq. 3

Configuration, initialisation and names are peft's: peft injects its adapters into a weightless skeleton of the layers,
and we attach the adapters' tensors to the real layers with module hooks. Injecting into the model itself would rename
its weights, and peft refuses the host's quantised layers.

The hooks detach the input, so that the layer runs without a graph, and re-attach its gradient afterwards, fetching
the weight again in backward:

    forward    y = layer(x.detach())        saved for backward: nothing of W, whatever its storage format
    backward   dx = dy W

So only A, B, x and A x are kept. LoRA tensors are float32 (or wider); the product is computed in the dtype of x.

Axis legend: ``r`` rank, ``in`` and ``out`` features of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError

LoraTargets = Literal["attention and mlp", "attention", "mlp", "all linear"]
WeightForBackward = Callable[[nn.Module, Tensor], AbstractContextManager[Tensor]]
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The shape of the adapters.

    Attributes:
        rank: r. A layer whose smaller side is below r gets that side as its rank, because its weight cannot change by
            more.
        alpha: The product is scaled by alpha / r, with this r, in every layer. The paper does not give rank or alpha;
            alpha = rank is our default.
        targets: Which linear layers of the kept blocks get an adapter.

    Raises:
        InvalidInputError: If rank or alpha is not positive, or the targets are unknown.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: LoraTargets = "attention and mlp"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidInputError(f"The rank must be at least 1, got {self.rank}.")
        if not 0.0 < self.alpha < math.inf:
            raise InvalidInputError(f"alpha must be positive, got {self.alpha}.")
        if self.targets not in get_args(LoraTargets):
            raise InvalidInputError(f"targets must be one of {', '.join(get_args(LoraTargets))}, got {self.targets!r}.")


@dataclass(frozen=True)
class LinearShape:
    """Input and output features of a linear layer."""

    in_features: int
    out_features: int

    @property
    def smaller_side(self) -> int:
        """The highest rank that a change to the layer's weight can have."""
        return min(self.in_features, self.out_features)


class LoraAdapters:
    """The trainable tensors of a LoRA, by the native name of the layer they belong to.

    Args:
        layers: Name below the diffusion model -> features.
        settings: Rank, alpha, targets.
        seed: Determines the initial A (Kaiming uniform, as in peft); B is zero.
        dtype: Dtype of the tensors; float32 suits every base format.
    """

    def __init__(
        self,
        layers: Mapping[str, LinearShape],
        settings: LoraSettings,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        import peft  # slow to import: only when a LoRA is created

        if not layers:
            raise InvalidInputError("No linear layer is left for the LoRA. Choose other targets or skip fewer blocks.")
        self.settings = settings
        self._ranks = {name: min(settings.rank, shape.smaller_side) for name, shape in layers.items()}
        narrow = [name for name, rank in self._ranks.items() if rank < settings.rank]
        self.config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=sorted(layers),
            init_lora_weights=True,
            rank_pattern={name: self._ranks[name] for name in narrow},
            alpha_pattern={name: self._ranks[name] * self.scale for name in narrow},
        )
        self._skeleton = _skeleton(layers)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's only: no other generator is used or changed
            peft.inject_adapter_in_model(self.config, self._skeleton)
        self._layers: dict[str, Any] = {name: self._skeleton.get_submodule(name) for name in layers}  # peft's classes
        for layer in self._layers.values():
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)

    @property
    def names(self) -> Sequence[str]:
        """The layers that have an adapter."""
        return list(self._layers)

    def down(self, name: str) -> nn.Parameter:
        """Return A, shape (r, in)."""
        return self._layers[name].lora_A[_ADAPTER].weight

    def up(self, name: str) -> nn.Parameter:
        """Return B, shape (out, r)."""
        return self._layers[name].lora_B[_ADAPTER].weight

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer's adapter."""
        return self._ranks[name]

    @property
    def narrow_layers(self) -> dict[str, int]:
        """Layers whose smaller side is below the requested rank, with the rank they got."""
        return {name: rank for name, rank in self._ranks.items() if rank < self.settings.rank}

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.settings.alpha / self.settings.rank

    def parameters(self) -> list[nn.Parameter]:
        """Return all trainable tensors, A before B, layer by layer."""
        return [tensor for name in self._layers for tensor in (self.down(name), self.up(name))]

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(tensor.numel() for tensor in self.parameters())

    @torch.inference_mode(False)  # hosts run nodes in inference mode, and tensors created there cannot be trained
    def to(self, device: torch.device) -> None:
        """Move the trainable tensors, keeping the parameter objects; tensors on ``meta`` stay there."""
        for parameter in self.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors as peft names them ("<layer>.lora_A.weight"), detached CPU clones."""
        import peft

        state = peft.get_peft_model_state_dict(self._skeleton)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of :meth:`state_dict`, bit for bit; absent layers keep theirs.

        Raises:
            InvalidInputError: If a layer is not one of these adapters', or has another shape.
        """
        own = {f"{name}.lora_{part}.weight": tensor for name in self.names
               for part, tensor in (("A", self.down(name)), ("B", self.up(name)))}  # fmt: skip
        for name, tensor in state.items():
            if name not in own:
                raise InvalidInputError(f"The LoRA has a layer that is not trained here: {name}.")
            if own[name].shape != tensor.shape:
                raise InvalidInputError(
                    f"The LoRA's {name} is {tuple(tensor.shape)}, here it is {tuple(own[name].shape)}. "
                    "Choose the same rank and targets."
                )
            own[name].copy_(tensor)

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module], weight_for_backward: WeightForBackward) -> Iterator[None]:
        """Make the adapters take effect within the context.

        Args:
            modules: Name -> layer, including all layers that have an adapter. The input gradient of the other layers
                is computed in the same way, so that no weight is saved for backward anywhere.
            weight_for_backward: Context manager that provides a layer's weight during backward.

        Raises:
            KeyError: If a layer that has an adapter is absent.
        """
        absent = sorted(self._layers.keys() - modules.keys())
        if absent:
            raise KeyError(absent[0])
        handles = []
        try:
            for name, module in modules.items():
                handles.extend(_detach_from_graph(module, weight_for_backward))
                if name in self._layers:
                    handles.append(_add_lora(module, self.down(name), self.up(name), self.scale))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _skeleton(layers: Mapping[str, LinearShape]) -> nn.Module:
    """Return a module tree with linear layers of these names, whose weights take the memory of one number each."""
    root = nn.Module()
    for name, shape in layers.items():
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        linear = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.zeros(1).expand(shape.out_features, shape.in_features), requires_grad=False)
        parent.add_module(leaf, linear)
    return root


def _detach_from_graph(module: nn.Module, weight_for_backward: WeightForBackward) -> list[Any]:
    """Make a layer run without a graph, and compute its input's gradient separately."""

    def detach_input(module: nn.Module, args: tuple) -> tuple:
        detached = args[0].detach()
        detached.attached_input = args[0]  # travels with the tensor, so nested and repeated calls cannot mix
        return (detached, *args[1:])

    def reattach_input(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].attached_input
        if x.requires_grad and torch.is_grad_enabled():
            return _ReattachInput.apply(x, output, module, weight_for_backward)
        return output

    return [module.register_forward_pre_hook(detach_input), module.register_forward_hook(reattach_input)]


def _add_lora(module: nn.Module, down: Tensor, up: Tensor, scale: float) -> Any:
    """Add the low-rank product to a layer's output; call it after :func:`_detach_from_graph`."""

    def add_product(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].attached_input
        low = nn.functional.linear(x, down.to(x.dtype))
        return output + nn.functional.linear(low, (up * scale).to(x.dtype)).to(output.dtype)

    return module.register_forward_hook(add_product)


class _ReattachInput(torch.autograd.Function):
    """Identity on a layer's output whose backward is the layer's input gradient, ``dx = dy W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, module: nn.Module, lend: WeightForBackward) -> Tensor:
        ctx.module, ctx.lend, ctx.dtype = module, lend, x.dtype
        # Not a view, or autograd would refuse blocks that write into it, as those of FLUX.2 and Krea 2 do.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        with ctx.lend(ctx.module, grad) as weight:
            return (grad @ weight).to(ctx.dtype), None, None, None


@contextmanager
def plain_weight(module: nn.Module, like: Tensor) -> Iterator[Tensor]:
    """Provide the weight of an ordinary linear layer; hosts have their own version."""
    yield module.get_parameter("weight").to(like)
