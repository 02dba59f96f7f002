"""State dicts under original names: of the base, and with W + ΔW of each adapted weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_param.errors import ChainError
from lora_param.model.attach import Site, first_order
from lora_param.model.chains import chain_of, chain_value, is_plain_chain, originals_of, others_of
from lora_param.model.lora import LoRA
from lora_param.model.sites import by_weight, sites, unwrapped
from lora_param.targets.weights import canonical_name
from lora_param.weight.update import merge

__all__ = ["base_state_dict", "check_chains", "merge_identity"]
__all__ += ["merged_state_dict", "merged_weight"]
__all__ += ["renamed_state_dict"]


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as without LoRA: original names and order, base values, no factors.

    The tensors are the model's own (detached), as in `model.state_dict()`.

    Example:
        >>> import lora_param as lp
        >>> list(lp.base_state_dict(lp.apply(nn.Linear(4, 4), ["weight"], rank=2)))
        ['weight', 'bias']
    """
    return renamed_state_dict(unwrapped(model), {})


def merged_state_dict(model: nn.Module, *, chain: bool = False) -> dict[str, Tensor]:
    """The model's state dict with W + ΔW of all enabled updates under the original names.

    For any `save_pretrained(path, state_dict=...)`: what is saved loads into the plain model.
    Merged weights are new tensors, one for each tied group; the others are the model's own.

    Args:
        model: an adapted model.
        chain: where other parametrizations stand on an adapted weight, merge their whole chain.

    Raises:
        ChainError: another parametrization stands on an adapted weight.
    """
    model = unwrapped(model)
    found = sites(model)
    check_chains(found, chain)
    merged: dict[tuple[int, ...], Tensor] = {}
    of_weight: dict[tuple[int, str], Tensor] = {}
    for group in by_weight(found):
        key = merge_identity(group)
        if key not in merged:
            merged[key] = merged_weight(group)
        of_weight[id(group[0].owner), group[0].tensor] = merged[key]
    return renamed_state_dict(model, {s.name: of_weight[id(s.owner), s.tensor] for s in found})


def renamed_state_dict(
    model: nn.Module, values: Mapping[str, Tensor], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`model.state_dict()` without LoRA's entries, in the order of a model without LoRA.

    Args:
        model: an adapted model.
        values: what to put under an original name instead of the base.
        given: the model's state dict, where it was gathered elsewhere.
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
            name = canonical_name(f"{prefix}{tensor}")
            merged = name in values or is_plain_chain(module, tensor)
            for index, item in chain.named_children():
                gone = merged or isinstance(item, LoRA)
                for key in item.state_dict():
                    rename[f"{inner}{index}.{key}"] = None if gone else f"{inner}{kept}.{key}"
                kept += not gone
            if merged:
                first_original, *more = originals_of(chain)
                rename |= {f"{inner}{original}": None for original in more}
                rename[f"{inner}{first_original}"] = name
    state: dict[str, Tensor] = {}
    for key, value in (model.state_dict() if given is None else given).items():
        name = rename.get(key, key)
        if name is not None:
            name = canonical_name(name)
            state[name] = values.get(name, value)
    return dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))


def merge_identity(group: list[Site]) -> tuple[int, ...]:
    """Equal for weights that share base and factors, and so their merged value."""
    site = group[0]
    if not is_plain_chain(site.owner, site.tensor):
        return (id(chain_of(site.owner, site.tensor)),)
    return (id(site.original), *(id(s.lora) for s in group))


@torch.no_grad()
def merged_weight(group: list[Site]) -> Tensor:
    """W + ΔW of all enabled updates on one weight, in the weight's dtype; or the whole chain's."""
    site = group[0]
    if not is_plain_chain(site.owner, site.tensor):
        return chain_value(site.owner, site.tensor)
    updates = [s.lora.update() for s in group if s.lora.enabled]
    return merge(site.original.detach(), updates)


def check_chains(found: list[Site], chain: bool) -> None:
    """Refuse weights that carry another parametrization besides LoRA, unless all of it is merged.

    Raises:
        ChainError: there are such, and `chain` is False, or not all of their adapters are found.
    """
    for group in by_weight(found):
        owner, tensor, name = group[0].owner, group[0].tensor, group[0].name
        others = others_of(owner, tensor)
        if not others:
            continue
        mine = {id(s.lora) for s in group}
        loras = [p for p in chain_of(owner, tensor).children() if isinstance(p, LoRA)]
        kept = [p.adapter for p in loras if id(p) not in mine]
        if kept or not chain:
            raise ChainError(name, others, kept if chain else ())
