"""Attaching `LoRA` to a parameter and taking it off again.

With `chains` and `injected` the only files that touch `torch.nn.utils.parametrize`. Registration is
torch's own, so that torch and everyone else recognise it; the class that torch injects is replaced,
see `injected`. A module that somebody else has parametrized keeps torch's class; LoRA joins its
chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_param.model.chains import base_of, chain_of, chains_of, is_plain_chain, originals_of
from lora_param.model.injected import BASE, FUSED, TENSORS, is_ours, shared_class, unshare_class
from lora_param.model.loading import hook_loading, unhook_loading
from lora_param.model.lora import LoRA
from lora_param.targets.weights import canonical_name
from lora_param.weight.base import storage_of

__all__ = ["Site", "first_order", "register_lora", "replace_original", "sites_of"]
__all__ += ["unregister_loras"]

_ORDER = "_lora_param_order"  # on the ModuleDict: the owner's parameters in their first order


@dataclass(frozen=True, slots=True)
class Site:
    """Where a LoRA is attached.

    Attributes:
        name: full name of the weight, as without parametrization.
        owner: the module that has the weight.
        tensor: the weight's name on its owner.
        lora: what is attached there.
        inner: what the names of its tensors begin with in the model's state dict.
    """

    name: str
    owner: nn.Module
    tensor: str
    lora: LoRA
    inner: str

    @property
    def key(self) -> str:
        """The target's key: name and slice."""
        return f"{self.name}{self.lora.region}"

    @property
    def original(self) -> Tensor:
        """The base W."""
        return base_of(chain_of(self.owner, self.tensor))


def first_order(owner: nn.Module) -> tuple[str, ...]:
    """Names of the owner's parameters, in their order before any was adapted."""
    lists = owner._modules.get("parametrizations")
    order: tuple[str, ...] = lists.__dict__.get(_ORDER, ()) if lists is not None else ()
    return order


def sites_of(model: nn.Module) -> Iterator[Site]:
    """Every LoRA on the model, in the order of the modules; under each name of what is shared.

    A module on which torch's own function registered it gets our class here, when first seen.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        lists = module._modules.get("parametrizations")
        if not isinstance(lists, nn.ModuleDict):
            continue
        if any(isinstance(p, LoRA) for chain in lists.children() for p in chain.children()):
            _adopt(module)
        for tensor, chain in lists.items():
            prefix = f"{path}." if path else ""
            name, inner = canonical_name(f"{prefix}{tensor}"), f"{prefix}parametrizations.{tensor}."
            for item in chain.children():
                if isinstance(item, LoRA):
                    yield Site(name, module, tensor, item, inner)


def register_lora(owner: nn.Module, tensor: str, lora: LoRA, *, fused: bool = False) -> None:
    """Register `lora` on a parameter of `owner`. The Parameter stays the same object.

    `fused` says that the owner is part of a module that has fused kernels for evaluation.

    As `register_parametrization` does it, without what costs a build or a class for each weight:
    its check forward, since planning has already checked all that it checks, and its injected
    class, since ours takes its place.
    """
    lists = owner._modules.get("parametrizations")
    if lists is not None and (tensor in lists._modules or not is_ours(owner)):
        parametrize.register_parametrization(owner, tensor, lora, unsafe=True)
        if not is_ours(owner):
            hook_loading(owner)
        return
    if lists is None:
        lists = owner._modules["parametrizations"] = nn.ModuleDict()
        lists.__dict__[_ORDER] = tuple(owner._parameters)
    original = cast(nn.Parameter, owner._parameters[tensor])
    if storage_of(original) is None:
        chain = parametrize.ParametrizationList([lora], original, unsafe=True)
    else:  # torch would write to it
        chain = parametrize.ParametrizationList([lora], nn.Parameter(torch.empty(0)), unsafe=True)
        chain._parameters["original"] = original
    del owner._parameters[tensor]
    lists._modules[tensor] = chain if owner.training else chain.eval()
    base = getattr(type(owner), BASE, type(owner))
    fused = fused or getattr(type(owner), FUSED, False)
    owner.__class__ = shared_class(base, tuple(lists._modules), fused)


def unregister_loras(owner: nn.Module, tensor: str, gone: Collection[LoRA]) -> None:
    """Take LoRAs off a parameter. The last one off leaves class, keys and Parameter as before."""
    chain = chain_of(owner, tensor)
    kept = [p for p in chain if not any(p is g for g in gone)]
    if len(kept) == len(chain):
        return
    if kept:
        for index in reversed(range(len(chain))):
            del chain[index]
        chain.extend(kept)
        return
    if not is_ours(owner):
        unshare_class(owner)
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=False)
        unhook_loading(owner)
        return
    lists = chains_of(owner)
    order = lists.__dict__[_ORDER]
    del lists[tensor]
    base = getattr(type(owner), BASE)
    if lists:
        owner.__class__ = shared_class(base, tuple(lists), getattr(type(owner), FUSED))
    else:
        del owner._modules["parametrizations"]
        owner.__class__ = base
    original = chain._parameters.get("original")
    if original is None:
        owner.register_buffer(tensor, chain.original)
    else:
        owner.register_parameter(tensor, original)
        parameters = owner._parameters
        for name in [n for n in order if n in parameters]:
            parameters[name] = parameters.pop(name)  # back to the order they were made in


def replace_original(
    owner: nn.Module, tensor: str, parameter: nn.Parameter, *, only_lora: bool = False
) -> None:
    """Give the weight another base, where the one it had is shared with another name.

    With `only_lora` other parametrizations are taken off its chain.
    """
    chain = chain_of(owner, tensor)
    if only_lora:
        loras = [item for item in chain.children() if isinstance(item, LoRA)]
        for index in reversed(range(len(chain))):
            del chain[index]
        chain.extend(loras)
        for name in originals_of(chain):
            delattr(chain, name)
        chain.is_tensor = True
    chain._parameters["original"] = parameter


def _adopt(owner: nn.Module) -> None:
    """Give a module the class that `register_lora` gives, where torch registered LoRA on it.

    Where something else stands on it as well, it keeps torch's class and learns to load.
    """
    lists = chains_of(owner)
    tensors, cls = tuple(lists._modules), type(owner)
    if is_ours(owner) and cls.__dict__[TENSORS] == tensors:
        return
    if not all(is_plain_chain(owner, tensor) for tensor in tensors):
        if not is_ours(owner):
            hook_loading(owner)
        return
    if not is_ours(owner):
        if not all(isinstance(cls.__dict__.get(tensor), property) for tensor in tensors):
            return  # somebody else's mechanism
        unhook_loading(owner)
    # Where they stood among the other parameters is not known: weights are made before biases.
    lists.__dict__.setdefault(_ORDER, (*tensors, *owner._parameters))
    base = cls.__dict__[BASE] if is_ours(owner) else cls.__bases__[0]
    owner.__class__ = shared_class(base, tensors, getattr(cls, FUSED, False))
