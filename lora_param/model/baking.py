"""Baking a live model: W + ΔW written where W stood."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lora_param.errors import NoAdapterError, NonFiniteError
from lora_param.model.adapters import detach
from lora_param.model.attach import Site, replace_original
from lora_param.model.sites import by_weight, refuse_wrapped, sites, unwrapped
from lora_param.model.state import check_plain, merge_identity, merged_weight
from lora_param.weight.base import dense, storage_of

__all__ = ["bake", "check_finite"]

Model = TypeVar("Model", bound=nn.Module)


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
    check_plain(found)
    groups = by_weight(found)
    check_finite(groups)
    _write(inner, groups)
    detach(inner, found)
    return model


def check_finite(groups: list[list[Site]]) -> None:
    """Before anything is written: a factor or a merged value that is not a number."""
    for group in groups:
        original = dense(group[0].original.detach())
        for site in group:
            for name, factor in site.lora.factors().items() if site.lora.enabled else ():
                if not factor.isfinite().all():
                    raise NonFiniteError(f"{site.key}.{name}")
        if not (merged_weight(group).isfinite() | ~original.isfinite()).all():
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
        shared.setdefault(merge_identity(group), []).append(group)
    for members in shared.values():
        original, merged = members[0][0].original, merged_weight(members[0])
        if holders[id(original)] == len(members) and storage_of(original) is None:
            original.copy_(merged)
            continue
        own = nn.Parameter(merged, requires_grad=original.requires_grad)
        holders[id(original)] -= len(members)
        for group in members:
            replace_original(group[0].owner, group[0].tensor, own)
