"""State dicts under original names, and baking: writing W + ΔW where W stood."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_param.errors import ModelError, NoAdapterError, NonFiniteError
from lora_param.model.adapters import detach
from lora_param.model.attach import Site, first_order, is_plain_chain, replace_original
from lora_param.model.lora import LoRA
from lora_param.model.sites import by_weight, refuse_wrapped, sites, unwrapped
from lora_param.targets.weights import canonical_name
from lora_param.weight.base import dense, storage_of
from lora_param.weight.update import merge

__all__ = ["bake", "base_state_dict", "merged_state_dict"]

Model = TypeVar("Model", bound=nn.Module)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as without LoRA: original names and order, base values, no factors.

    The tensors are the model's own (detached), as in `model.state_dict()`.

    Example:
        >>> import lora_param as lp
        >>> list(lp.base_state_dict(lp.apply(nn.Linear(4, 4), ["weight"], rank=2)))
        ['weight', 'bias']
    """
    return _renamed(unwrapped(model), {})


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with W + ΔW of all enabled updates under the original names.

    For any `save_pretrained(path, state_dict=...)`: what is saved loads into the plain model.
    Merged weights are new tensors, one for each tied group; the others are the model's own.

    Raises:
        ModelError: another parametrization stands on an adapted weight.
    """
    model = unwrapped(model)
    found = sites(model)
    _check_plain(found)
    merged: dict[tuple[int, ...], Tensor] = {}
    of_weight: dict[tuple[int, str], Tensor] = {}
    for group in by_weight(found):
        key = _identity(group)
        if key not in merged:
            merged[key] = _merged(group)
        of_weight[id(group[0].owner), group[0].tensor] = merged[key]
    return _renamed(model, {s.name: of_weight[id(s.owner), s.tensor] for s in found})


def _renamed(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`model.state_dict()` without LoRA's entries, in the order of a model without LoRA.

    Args:
        model: an adapted model.
        values: what to put under an original name instead of the base.
    """
    order: dict[str, int] = {}
    rename: dict[str, str | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        first, lists = first_order(module), module._modules.get("parametrizations")
        for name in (*first, *module._parameters, *module._buffers):
            order.setdefault(canonical_name(prefix + name), len(order))
        for tensor, chain in lists.named_children() if lists is not None else ():
            inner, kept = f"{prefix}parametrizations.{tensor}.", 0
            plain = is_plain_chain(module, tensor)
            for index, item in chain.named_children():
                is_lora = isinstance(item, LoRA)
                for key in item.state_dict():
                    new = None if is_lora else f"{inner}{kept}.{key}"
                    rename[f"{inner}{index}.{key}"] = new
                kept += not is_lora
            if plain:
                rename[f"{inner}original"] = f"{prefix}{tensor}"
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = rename.get(key, key)
        if name is not None:
            name = canonical_name(name)
            state[name] = values.get(name, value)
    return dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))


def _identity(group: list[Site]) -> tuple[int, ...]:
    """Equal for weights that share base and factors, and so their merged value."""
    return (id(group[0].original), *(id(s.lora) for s in group))


@torch.no_grad()
def _merged(group: list[Site]) -> Tensor:
    updates = [s.lora.update() for s in group if s.lora.enabled]
    return merge(group[0].original.detach(), updates)


def _check_plain(found: list[Site]) -> None:
    for site in found:
        if not is_plain_chain(site.owner, site.tensor):
            raise ModelError(
                f"{site.name} carries another parametrization besides LoRA, through which W + ΔW "
                f"cannot be written; remove that one first."
            )


def bake(model: Model, adapter: str | None = None) -> Model:
    """Write W + ΔW where W stood and forget the factors; plain modules again.

    Each weight is merged in fp32 (fp64 for fp64 weights) and rounded once to its own dtype; the
    Parameters stay the same objects. A disabled update adds nothing. A tensor that several names
    share is merged once; where a name was adapted apart from the others, it gets its own copy.

    Args:
        model: an adapted model.
        adapter: bake one adapter and leave the others attached, or all where None.

    Raises:
        NoAdapterError: no such adapter.
        NonFiniteError: a factor, or a merged weight, is NaN or infinite; the model is unchanged.
        ModelError: another parametrization stands on an adapted weight.
        WrappedModelError: the model is sharded by FSDP.
    """
    found = sites(model, adapter)
    if not found:
        raise NoAdapterError(adapter, [])
    inner = unwrapped(model)
    refuse_wrapped(inner)
    _check_plain(found)
    groups = by_weight(found)
    _check_finite(groups)
    _write(inner, groups)
    detach(inner, found)
    return model


def _check_finite(groups: list[list[Site]]) -> None:
    """Before anything is written: a factor or a merged value that is not a number."""
    for group in groups:
        original = dense(group[0].original.detach())
        for site in group:
            for name, factor in site.lora.factors().items() if site.lora.enabled else ():
                if not factor.isfinite().all():
                    raise NonFiniteError(f"{site.key}.{name}")
        if not (_merged(group).isfinite() | ~original.isfinite()).all():
            raise NonFiniteError(f"{group[0].name} merged to {original.dtype}")


@torch.no_grad()
def _write(model: nn.Module, groups: list[list[Site]]) -> None:
    """Merge in place where nobody else reads the base; else give the names one of their own."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    shared: dict[tuple[int, ...], list[list[Site]]] = {}
    for group in groups:
        shared.setdefault(_identity(group), []).append(group)
    for members in shared.values():
        original, merged = members[0][0].original, _merged(members[0])
        if holders[id(original)] == len(members) and storage_of(original) is None:
            original.copy_(merged)
            continue
        own = nn.Parameter(merged, requires_grad=original.requires_grad)
        holders[id(original)] -= len(members)
        for group in members:
            replace_original(group[0].owner, group[0].tensor, own)
