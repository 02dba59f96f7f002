"""Baking a live model: W + ΔW written where W stood."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lora_param.errors import DependentUpdateError, NoAdapterError, NonFiniteError
from lora_param.model.adapters import detach
from lora_param.model.attach import Site, replace_original
from lora_param.model.chains import chain_of, is_plain_chain, originals_of
from lora_param.model.lora import LoRA
from lora_param.model.sites import by_weight, refuse_wrapped, sites, unwrapped
from lora_param.model.state import check_chains, merge_identity, merged_weight
from lora_param.weight.base import dense, storage_of
from lora_param.weight.precision import compute_dtype
from lora_param.weight.update import Deferred

__all__ = ["bake", "check_finite"]

Model = TypeVar("Model", bound=nn.Module)


def bake(model: Model, adapter: str | None = None, *, chain: bool = False) -> Model:
    """Write W + ΔW where W stood and forget the factors; plain modules again.

    Each weight is merged in fp32 (fp64 for fp64 weights) and rounded once to its own dtype; the
    Parameters stay the same objects. A disabled update adds nothing. A tensor that several names
    share is merged once; where a name was adapted apart from the others, it gets its own copy.

    Args:
        model: an adapted model.
        adapter: bake one adapter and leave the others attached, or all where None.
        chain: where other parametrizations (weight_norm and the like) stand on an adapted weight,
            write what their whole chain gives in evaluation into one plain weight.

    Raises:
        NoAdapterError: no such adapter.
        DependentUpdateError: another adapter that stays, a DoRA, would add something else to the
            new weight, so that the output would change; the model is unchanged.
        NonFiniteError: a factor, or a merged weight, is NaN or infinite; the model is unchanged.
        ChainError: another parametrization stands on an adapted weight, and `chain` is False.
        WrappedModelError: the model is sharded by FSDP.
    """
    found = sites(model, adapter)
    if not found:
        raise NoAdapterError(adapter, [])
    inner = unwrapped(model)
    refuse_wrapped(inner)
    check_chains(found, chain)
    groups = by_weight(found)
    _check_independent(groups)
    check_finite(groups)
    _write(inner, groups)
    detach(inner, found)
    return model


@torch.no_grad()
def _check_independent(groups: list[list[Site]]) -> None:
    """Before anything is written: what stays adds to the new weight what it added to the old."""
    for group in groups:
        owner, tensor = group[0].owner, group[0].tensor
        baked = [s.lora for s in group]
        stays = [p for p in chain_of(owner, tensor).children() if isinstance(p, LoRA)]
        stays = [p for p in stays if not any(p is b for b in baked)]
        dependent = [(p, u) for p in stays if isinstance(u := p.update(), Deferred)]
        if not dependent:
            continue
        W, new = dense(group[0].original.detach()), merged_weight(group)
        wide = compute_dtype(W.dtype)
        for lora, update in dependent:
            if not torch.equal(update.delta(W, wide), update.delta(new, wide)):
                names = [b.adapter for b in baked if b.enabled]
                raise DependentUpdateError(
                    group[0].name, names, lora.adapter, lora.settings.variant
                )


def check_finite(groups: list[list[Site]]) -> None:
    """Before anything is written: a factor or a merged value that is not a number."""
    for group in groups:
        for site in group:
            for name, factor in site.lora.factors().items() if site.lora.enabled else ():
                if not factor.isfinite().all():
                    raise NonFiniteError(f"{site.key}.{name}")
        original = dense(group[0].original.detach())
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
        merged = merged_weight(members[0])
        owner, tensor = members[0][0].owner, members[0][0].tensor
        only_lora = not is_plain_chain(owner, tensor)
        originals = list(originals_of(chain_of(owner, tensor)).values())
        original = originals[0]
        if holders[id(original)] == len(members) and not only_lora and storage_of(original) is None:
            original.copy_(merged)
            continue
        own = nn.Parameter(merged, requires_grad=any(t.requires_grad for t in originals))
        holders[id(original)] -= len(members)
        for group in members:
            replace_original(group[0].owner, group[0].tensor, own, only_lora=only_lora)
