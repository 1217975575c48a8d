"""The lists of blocks in a model of any class."""

from __future__ import annotations

from torch import nn

LEAST_SHARE = 0.2  # of the largest list; smaller ones (text refiners and the like, up to 0.07) are not worth skipping
LEAST_OF_MODEL = 0.5  # in U-Nets, no list has half of the weights


def block_lists(model: nn.Module) -> list[str]:
    """Return the paths of the lists that hold a diffusion transformer's blocks, in the order of their definition.

    A list counts if its entries are of one class, it is not inside an entry of another list, and it has at least
    :data:`LEAST_SHARE` of the weights of the largest one; together they must have :data:`LEAST_OF_MODEL` of all weights.
    Lists that are left out belong to the stem or the head.

    Returns:
        The paths; none if the model is not a transformer.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and _are_blocks(module)
    }
    outer = {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    sizes = {name: num_weights(module) for name, module in outer.items()}
    chosen = [name for name, size in sizes.items() if size >= LEAST_SHARE * max(sizes.values())]
    enough = sum(sizes[name] for name in chosen) >= LEAST_OF_MODEL * num_weights(model)
    return chosen if enough else []


def num_weights(module: nn.Module) -> int:
    """Return the number of stored weights, which packed formats make fewer of."""
    return sum(parameter.numel() for parameter in module.parameters())


def _are_blocks(modules: nn.ModuleList) -> bool:
    same_class = len({type(module) for module in modules}) == 1
    return same_class and all(next(module.parameters(), None) is not None for module in modules)
