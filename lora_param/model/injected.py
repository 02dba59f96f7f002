"""The class that a module with adapted weights has.

torch gives a parametrized module a class of its own, on which its weights are properties. Ours
takes its place and differs in three ways:

- its properties read `self`. torch's close over the module they were made for, so that a deepcopy
  can return the original's weight;
- it can be pickled and copied. torch refuses to pickle, and its copies share a class that
  `remove_parametrizations` changes for both; ours is shared by all like modules, and never changed;
- a state dict under the original names loads, see `loading.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_param.errors import ComputedWeightError
from lora_param.model.cache import kept, kept_once
from lora_param.model.chains import chain_of, chains_of, read
from lora_param.model.loading import rename_base_keys
from lora_param.model.lora import LoRA
from lora_param.weight.adapted import AdaptedWeight
from lora_param.weight.opaque import opaque

__all__ = ["BASE", "FUSED", "TENSORS", "is_ours", "shared_class", "unshare_class"]

BASE = "_lora_param_base"  # on an injected class: the class that the module had
FUSED = "_lora_param_fused"  # on an injected class: the module is part of one with fused kernels
TENSORS = "_lora_param_tensors"  # on an injected class: what is computed on it

_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def shared_class(base: type[nn.Module], tensors: tuple[str, ...], fused: bool) -> type[nn.Module]:
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
        return chains_of(self)

    cls.parametrizations = property(get)  # type: ignore[attr-defined]
    return cls


def _make_class(base: type[nn.Module], tensors: tuple[str, ...], fused: bool) -> type[nn.Module]:
    """A class derived from `base` on which `tensors` are computed."""

    def load(self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        rename_base_keys(self, state_dict, prefix)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    def reduce(self: nn.Module, protocol: Any) -> Any:  # noqa: ARG001  pickle's signature
        return _rebuild, (base, tuple(chains_of(self)), fused), self.__getstate__()  # type: ignore[no-untyped-call]

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if isinstance(getattr(type(self), name, None), property) and name in tensors:
            if parameter is not None and _reads_as(chain_of(self, name), parameter):
                return
            raise ComputedWeightError(f"assigning {name!r}")
        base.register_parameter(self, name, parameter)

    namespace: dict[str, Any] = {tensor: _computed(tensor, fused) for tensor in tensors}
    namespace |= {
        BASE: base,
        FUSED: fused,
        TENSORS: tensors,
        "__module__": base.__module__,
        "__reduce_ex__": reduce,
        "_load_from_state_dict": load,
        "register_parameter": register,
    }
    # transformers writes the name of a model's class into its config
    name = base.__name__ if hasattr(base, "save_pretrained") else f"Parametrized{base.__name__}"
    return type(name, (base,), namespace)


def is_ours(module: nn.Module) -> bool:
    """The module has an injected class, and it is one of these."""
    return BASE in type(module).__dict__


def _computed(tensor: str, fused: bool) -> property:
    def get(self: nn.Module) -> Tensor:
        chain: nn.Module = self._modules["parametrizations"]._modules[tensor]  # type: ignore[union-attr, assignment]
        if parametrize._cache_enabled:
            return kept_once(chain, read, parametrize._cache)
        return kept(chain, read)

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
    own = read(chain)
    if not (isinstance(own, AdaptedWeight) and isinstance(value, AdaptedWeight)):
        return own is value
    return own.base is value.base and torch.equal(own.build(), value.build())


def _rebuild(base: type[nn.Module], tensors: tuple[str, ...], fused: bool = False) -> nn.Module:
    module = base.__new__(base)
    module.__class__ = shared_class(base, tensors, fused)
    return module


def unshare_class(owner: nn.Module) -> None:
    """Before torch takes a property off the class: a deepcopy may be using the same class."""
    cls = type(owner)
    owner.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
