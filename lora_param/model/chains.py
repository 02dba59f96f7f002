"""What stands on a tensor: its parametrizations in their order, LoRA among them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_param.model.loading import is_plain
from lora_param.model.lora import LoRA
from lora_param.weight.adapted import AdaptedWeight, built

__all__ = ["base_of", "chain_of", "chain_value", "chains_of", "is_adapted", "is_plain_chain"]
__all__ += ["originals_of", "others_of", "read", "same_weight"]


def chain_of(owner: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    """The parametrizations of a tensor, in order."""
    return cast(parametrize.ParametrizationList, chains_of(owner)._modules[tensor])


def originals_of(chain: parametrize.ParametrizationList) -> dict[str, Tensor]:
    """What the chain starts from, by its names there: one tensor, or several (weight_norm)."""
    several = [f"original{i}" for i in range(0 if chain.is_tensor else chain.ntensors)]
    return {name: getattr(chain, name) for name in several or ["original"]}


def base_of(chain: parametrize.ParametrizationList) -> Tensor:
    """W: the one tensor that the chain starts from, or what its first members make of several."""
    originals = originals_of(chain)
    if chain.is_tensor:
        return originals["original"]
    first, *rest = chain.children()
    value: Tensor = first(*originals.values())
    for item in rest:
        if isinstance(item, LoRA):
            break
        value = item(value)
    return value


@torch.no_grad()
def chain_value(owner: nn.Module, tensor: str) -> Tensor:
    """What the whole chain gives in evaluation, as a tensor of its own."""
    chain = chain_of(owner, tensor)
    modes = [(m, m.training) for m in chain.modules()]
    try:
        value = read(chain.eval())
        return value.build() if isinstance(value, AdaptedWeight) else value.clone()
    finally:
        for module, training in modes:
            module.training = training


def others_of(owner: nn.Module, tensor: str) -> list[str]:
    """Class names of the parametrizations besides LoRA on this tensor."""
    items = chain_of(owner, tensor).children()
    return [type(item).__name__ for item in items if not isinstance(item, LoRA)]


def chains_of(owner: nn.Module) -> nn.ModuleDict:
    """The module's parametrizations, without asking for them under their name (see `injected`)."""
    return cast(nn.ModuleDict, owner._modules["parametrizations"])


def is_plain_chain(owner: nn.Module, tensor: str) -> bool:
    """Nothing but LoRA is on this tensor."""
    return is_plain(chain_of(owner, tensor))


def is_adapted(owner: nn.Module, tensor: str) -> bool:
    """The tensor is computed."""
    lists = owner._modules.get("parametrizations")
    return lists is not None and tensor in lists._modules


def same_weight(one: tuple[nn.Module, str], other: tuple[nn.Module, str]) -> bool:
    """Two names of one Parameter, with the same LoRAs on it if there are any."""

    def parts(owner: nn.Module, tensor: str) -> list[object]:
        if not is_adapted(owner, tensor):
            return [owner._parameters.get(tensor)]
        chain = chain_of(owner, tensor)
        return [*originals_of(chain).values(), *chain.children()]

    found = parts(*one), parts(*other)
    return len(found[0]) == len(found[1]) and all(a is b for a, b in zip(*found, strict=True))


def read(chain: nn.Module) -> Tensor:
    """What the chain gives, without the look-ups that torch's own forward costs."""
    W = chain._parameters.get("original")
    if chain._backward_hooks or chain._backward_pre_hooks:
        with built():
            return cast(Tensor, chain())
    if chain._forward_hooks or chain._forward_pre_hooks or "forward" in chain.__dict__:
        return cast(Tensor, chain())  # accelerate puts a forward of its own on a module
    if W is None:
        return cast(Tensor, chain.forward())
    value: Tensor = W
    for item in chain._modules.values():
        value = cast(nn.Module, item)(value)
    return value
