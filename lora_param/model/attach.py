"""Attaching `LoRA` to a parameter and taking it off again.

The only file that touches `torch.nn.utils.parametrize`. Registration is torch's own, so that torch
and everyone else recognise it; the class that torch injects is replaced by one that differs in
three ways:

- its properties read `self`. torch's close over the module they were made for, so that a deepcopy
  can return the original's weight;
- it can be pickled and copied. torch refuses to pickle, and its copies share a class that
  `remove_parametrizations` changes for both; ours is shared by all like modules, and never changed;
- a state dict under the original names loads, see `loading.py`.

A module that somebody else has parametrized keeps torch's class; LoRA joins its chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_param.errors import ComputedWeightError
from lora_param.model.cache import kept, kept_once
from lora_param.model.loading import hook_loading, is_plain, rename_base_keys, unhook_loading
from lora_param.model.lora import LoRA
from lora_param.targets.weights import canonical_name
from lora_param.weight.adapted import AdaptedWeight, built
from lora_param.weight.base import storage_of
from lora_param.weight.opaque import opaque

__all__ = ["Site", "base_of", "chain_of", "chain_value", "first_order", "is_adapted"]
__all__ += ["is_plain_chain", "originals_of", "others_of", "register_lora", "replace_original"]
__all__ += ["same_weight", "sites_of", "unregister_loras"]

_ORDER = "_lora_param_order"  # on the ModuleDict: the owner's parameters in their first order
_BASE = "_lora_param_base"  # on an injected class: the class that the module had
_FUSED = "_lora_param_fused"  # on an injected class: the module is part of one with fused kernels
_TENSORS = "_lora_param_tensors"  # on an injected class: what is computed on it


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


def chain_of(owner: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    """The parametrizations of a tensor, in order."""
    return cast(parametrize.ParametrizationList, _lists(owner)._modules[tensor])


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
        value = _read(chain.eval())
        return value.build() if isinstance(value, AdaptedWeight) else value.clone()
    finally:
        for module, training in modes:
            module.training = training


def others_of(owner: nn.Module, tensor: str) -> list[str]:
    """Class names of the parametrizations besides LoRA on this tensor."""
    items = chain_of(owner, tensor).children()
    return [type(item).__name__ for item in items if not isinstance(item, LoRA)]


def _lists(owner: nn.Module) -> nn.ModuleDict:
    """The module's parametrizations, without asking for them under their name (see below)."""
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
    if lists is not None and (tensor in lists._modules or not _is_ours(owner)):
        parametrize.register_parametrization(owner, tensor, lora, unsafe=True)
        if not _is_ours(owner):
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
    base = getattr(type(owner), _BASE, type(owner))
    fused = fused or getattr(type(owner), _FUSED, False)
    owner.__class__ = _shared_class(base, tuple(lists._modules), fused)


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
    if not _is_ours(owner):
        _unshare_class(owner)
        parametrize.remove_parametrizations(owner, tensor, leave_parametrized=False)
        unhook_loading(owner)
        return
    lists = _lists(owner)
    order = lists.__dict__[_ORDER]
    del lists[tensor]
    base = getattr(type(owner), _BASE)
    if lists:
        owner.__class__ = _shared_class(base, tuple(lists), getattr(type(owner), _FUSED))
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


# --- the injected class -----------------------------------------------------------------------


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def _shared_class(base: type[nn.Module], tensors: tuple[str, ...], fused: bool) -> type[nn.Module]:
    """The class of all modules of class `base` on which `tensors` are computed.

    Sharing it lets torch.compile use one graph for many like modules. But torch's own functions
    change the class of the module they are given: whoever asks a module for its
    `parametrizations`, as they all do first, gives it a class of its own.
    """
    known = _classes.get((base, tensors, fused))
    if known is not None:
        return known
    cls = _classes[base, tensors, fused] = _make_class(base, tensors, fused)

    def get(self: nn.Module) -> nn.Module:
        self.__class__ = _make_class(base, tensors, fused)
        return _lists(self)

    cls.parametrizations = property(get)  # type: ignore[attr-defined]
    return cls


def _make_class(base: type[nn.Module], tensors: tuple[str, ...], fused: bool) -> type[nn.Module]:
    """A class derived from `base` on which `tensors` are computed."""

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename_base_keys(self, state_dict, prefix)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    def reduce(self: nn.Module, protocol: Any) -> Any:  # noqa: ARG001  pickle's signature
        return _rebuild, (base, tuple(_lists(self)), fused), self.__getstate__()  # type: ignore[no-untyped-call]

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if isinstance(getattr(type(self), name, None), property) and name in tensors:
            if parameter is not None and _reads_as(chain_of(self, name), parameter):
                return
            raise ComputedWeightError(f"assigning {name!r}")
        base.register_parameter(self, name, parameter)

    namespace: dict[str, Any] = {tensor: _computed(tensor, fused) for tensor in tensors}
    namespace |= {
        _BASE: base,
        _FUSED: fused,
        _TENSORS: tensors,
        "__module__": base.__module__,
        "__reduce_ex__": reduce,
        "_load_from_state_dict": load,
        "register_parameter": register,
    }
    # transformers writes the name of a model's class into its config
    name = base.__name__ if hasattr(base, "save_pretrained") else f"Parametrized{base.__name__}"
    return type(name, (base,), namespace)


def _adopt(owner: nn.Module) -> None:
    """Give a module the class that `register_lora` gives, where torch registered LoRA on it.

    Where something else stands on it as well, it keeps torch's class and learns to load.
    """
    lists = _lists(owner)
    tensors, cls = tuple(lists._modules), type(owner)
    if _is_ours(owner) and cls.__dict__[_TENSORS] == tensors:
        return
    if not all(is_plain_chain(owner, tensor) for tensor in tensors):
        if not _is_ours(owner):
            hook_loading(owner)
        return
    if not _is_ours(owner):
        if not all(isinstance(cls.__dict__.get(tensor), property) for tensor in tensors):
            return  # somebody else's mechanism
        unhook_loading(owner)
    # Where they stood among the other parameters is not known: weights are made before biases.
    lists.__dict__.setdefault(_ORDER, (*tensors, *owner._parameters))
    base = cls.__dict__[_BASE] if _is_ours(owner) else cls.__bases__[0]
    owner.__class__ = _shared_class(base, tensors, getattr(cls, _FUSED, False))


def _is_ours(module: nn.Module) -> bool:
    return _BASE in type(module).__dict__


def _computed(tensor: str, fused: bool) -> property:
    def get(self: nn.Module) -> Tensor:
        chain: nn.Module = self._modules["parametrizations"]._modules[tensor]  # type: ignore[union-attr, assignment]
        if parametrize._cache_enabled:
            return kept_once(chain, _read, parametrize._cache)
        return kept(chain, _read)

    def get_for_kernels(self: nn.Module) -> Tensor:
        value = get(self)
        if self.training or not isinstance(value, AdaptedWeight) or value.requires_grad:
            return value
        return opaque(value)

    def set_(self: nn.Module, value: Tensor) -> None:
        chain = chain_of(self, tensor)
        if _reads_as(chain, value):
            return  # transformers' tie_weights assigns what is there
        if any(isinstance(p, LoRA) for p in chain):
            raise ComputedWeightError(f"assigning {tensor!r}")
        chain.right_inverse(value)

    def delete(self: nn.Module) -> None:  # noqa: ARG001  a property's signature
        raise ComputedWeightError(f"deleting {tensor!r}")

    return property(get_for_kernels if fused else get, set_, delete)


def _reads_as(chain: parametrize.ParametrizationList, value: Tensor) -> bool:
    """The value is what the chain gives, of the same base and not just of equal numbers."""
    own = _read(chain)
    if not (isinstance(own, AdaptedWeight) and isinstance(value, AdaptedWeight)):
        return own is value
    return own.base is value.base and torch.equal(own.build(), value.build())


def _read(chain: nn.Module) -> Tensor:
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


def _rebuild(base: type[nn.Module], tensors: tuple[str, ...], fused: bool = False) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = _shared_class(base, tensors, fused)
    return module


def _unshare_class(owner: nn.Module) -> None:
    """Before torch takes a property off the class: a deepcopy may be using the same class."""
    cls = type(owner)
    owner.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
