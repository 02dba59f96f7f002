"""Finding things on a model: where LoRA is attached, and where a weight lives."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_param.adapter import check_name
from lora_param.errors import NoAdapterError, NoMatchError, OptionError, WrappedModelError
from lora_param.model.attach import Site, sites_of
from lora_param.model.chains import base_of, chain_of
from lora_param.model.lora import LoRA
from lora_param.model.weights import as_module
from lora_param.targets.matching import match_targets
from lora_param.targets.weights import Weight, canonical_name
from lora_param.weight.base import logical_shape

__all__ = ["Patterns", "adapter_names", "base_tensor", "base_tensors", "by_weight", "chosen_loras"]
__all__ += ["own_sites", "owners", "refuse_wrapped", "sites", "unwrapped"]

Patterns = str | Iterable[str]

_WRAPPERS = ("DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where DataParallel, DDP or an `AveragedModel` stand around it.

    Raises:
        OptionError: it is not a module.
    """
    model = as_module(model)
    while type(model).__name__ in ("DataParallel", "DistributedDataParallel", "AveragedModel"):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def sites(model: nn.Module, adapter: str | None = None) -> list[Site]:
    """Where LoRA is attached: all of it, or one adapter's.

    Raises:
        NoAdapterError: no adapter of that name.
        OptionError: `adapter` is not a name.
    """
    found = list(sites_of(unwrapped(model)))
    if adapter is None:
        return found
    name = check_name(adapter)
    mine = [s for s in found if s.lora.adapter == name]
    if not mine:
        raise NoAdapterError(adapter, _names(found))
    return mine


def own_sites(found: Iterable[Site]) -> list[Site]:
    """One site for each LoRA: of those that stand on several tied names, the first."""
    return list({id(s.lora): s for s in reversed(list(found))}.values())[::-1]


def by_weight(found: Iterable[Site]) -> list[list[Site]]:
    """Sites grouped by the weight they are on; each LoRA once a weight."""
    groups: dict[tuple[int, str], dict[int, Site]] = {}
    for site in found:
        groups.setdefault((id(site.owner), site.tensor), {}).setdefault(id(site.lora), site)
    return [list(group.values()) for group in groups.values()]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in order of first appearance."""
    return _names(sites(model))


def _names(found: Iterable[Site]) -> list[str]:
    return list(dict.fromkeys(s.lora.adapter for s in found))


def chosen_loras(
    model: nn.Module, targets: Patterns | None = None, *, adapter: str | None = None
) -> list[LoRA]:
    """The LoRAs of an adapter (of all where None) that the patterns name (all where None).

    Raises:
        NoAdapterError: no such adapter.
        TargetError: a pattern matches none of its targets.
        OptionError: `adapter` is not a name, or a pattern that matches nothing is one.
    """
    found = sites(model, adapter)
    if not found:
        raise NoAdapterError(adapter, [])
    if targets is None:
        return [s.lora for s in found]
    keys = {s.key: Weight(s.name, logical_shape(s.original)) for s in found}
    try:
        named = set(match_targets(keys, targets))
    except NoMatchError as error:
        if error.pattern in adapter_names(model):
            accepted = f"patterns over weights; the adapter is chosen by adapter={error.pattern!r}"
            raise OptionError("targets", error.pattern, accepted) from None
        raise
    return [s.lora for s in found if s.key in named]


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Weight name → the module that has it, and its name there; shared modules under each name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        lists = module._modules.get("parametrizations")
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        for tensor in (*own, *(lists._modules if lists is not None else ())):
            name = canonical_name(f"{path}.{tensor}" if path else tensor)
            found.setdefault(name, (module, tensor))
    return found


def base_tensor(owner: nn.Module, tensor: str) -> Tensor:
    """W: the parameter, or what the parametrizations that stand below LoRA start from."""
    own = owner._parameters.get(tensor)
    return base_of(chain_of(owner, tensor)) if own is None else own


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base W of every weight, by its original name."""
    return {name: base_tensor(*where) for name, where in owners(model).items()}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model on which attaching or detaching would go unseen by a wrapper.

    Raises:
        WrappedModelError: it is wrapped by DDP, or sharded by FSDP.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise WrappedModelError(cls.__name__)
