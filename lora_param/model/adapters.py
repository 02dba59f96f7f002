"""Adapters on a model: putting them on, training them, and taking them off.

The state is in the `LoRA` modules themselves. Only what `apply` froze is remembered beside them,
on the model that it was given.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from lora_param.adapter import Adapter, AdapterTarget, check_name
from lora_param.errors import AdapterExistsError, NoAdapterError
from lora_param.model.attach import Site, register_lora, sites_of, unregister_loras
from lora_param.model.lora import BuiltLoRA, LoRA
from lora_param.model.pretrained import dress, undress
from lora_param.model.record import check_base
from lora_param.model.sites import (
    Patterns,
    adapter_names,
    base_tensor,
    by_weight,
    own_sites,
    owners,
    refuse_wrapped,
    sites,
    unwrapped,
)
from lora_param.model.weights import buffers_of, weights_of
from lora_param.targets.lora_config import LoraConfig, chosen_by
from lora_param.targets.options import takes_settings
from lora_param.targets.plan import PlannedTarget, Tied, make_plan
from lora_param.targets.regions import Target
from lora_param.targets.settings import SettingsOptions
from lora_param.targets.weights import canonical_name
from lora_param.weight.adapted import AdaptedWeight
from lora_param.weight.base import dense, logical_dtype, logical_shape
from lora_param.weight.init import fresh_tensors
from lora_param.weight.precision import compute_dtype

__all__ = ["apply", "attach", "detach", "param_groups", "parameters", "remove"]

Model = TypeVar("Model", bound=nn.Module)

_FROZEN = "_lora_param_frozen"  # on the model given to apply: names of what it froze
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)  # they have kernels for evaluation


@takes_settings
def apply(
    model: Model,
    targets: Patterns | LoraConfig = "all-linear",
    *,
    exclude: Patterns = (),
    adapter: str = "default",
    freeze: bool = True,
    inplace: bool = True,
    tied: Tied = "error",
    generator: torch.Generator | None = None,
    **options: Unpack[SettingsOptions],
) -> Model:
    """Register LoRA on the chosen weights of a model.

    Afterwards `module.weight` is W + scale·(B @ A) for each of them, where B (out × rank) is zero
    and A (rank × in) is random, so that the model computes what it did before. The factors are
    fp32 (fp64 for fp64 weights), on the weight's device, and the only parameters that train.

    Args:
        model: any module; changed in place.
        targets: patterns that choose weights, see the README's "Targets"; or a `peft.LoraConfig`
            or its dict, which says the settings as well.
        exclude: patterns that take away.
        adapter: its name, for models that carry several.
        freeze: set requires_grad to False on everything but the factors; `remove` and `bake` set
            it back.
        inplace: False leaves the model as it is and works on a deep copy.
        tied: a tensor known under several names of which only some are targeted is an error,
            unless this is "together" (all share the factors) or "apart" (the others keep W).
        generator: source of randomness for the factors; torch's own where None.
        **options: the settings of what the patterns do not set.

    Returns:
        The model.

    Raises:
        TargetError: a pattern matches nothing, or a weight or slice does not fit.
        OptionError, UnknownOptionError: a setting outside its accepted values, or none.
        AdapterExistsError: the model has an adapter of this name.
        WrappedModelError: the model is already wrapped by DDP or FSDP.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = apply(model, ["0"], rank=2)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        32
    """
    weights = weights_of(model)
    targets, settings = chosen_by(apply, targets, exclude, options, weights)
    _check_can_attach(model, adapter)
    plan = make_plan(
        weights,
        targets,
        exclude=exclude,
        settings=settings,
        tied=tied,
        buffers=buffers_of(model),
    )
    if not inplace:
        model = copy.deepcopy(model)
    where = owners(model)
    loras = [
        (AdapterTarget.from_plan(p), _fresh_factors(p, where[p.target.name], generator))
        for p in plan.targets
    ]
    _put_on(model, where, loras, adapter, freeze)
    return model


def attach(
    model: Model,
    adapter: Adapter,
    name: str | None = None,
    *,
    freeze: bool = True,
    check_fingerprint: bool = True,
) -> Model:
    """Put an adapter record on a model.

    Args:
        model: the model it was made on, or one of the same names, shapes and weights.
        adapter: from `read_adapter`, `get_adapter` and the like. Its tensors are copied.
        name: the name to give it; its own where None.
        freeze: set requires_grad to False on everything but the factors.
        check_fingerprint: refuse a base with other dtypes or values.

    Raises:
        MismatchError: names or shapes differ; both sides are listed.
        FingerprintError: same names and shapes, another base.
        AdapterExistsError: the model has an adapter of this name.
    """
    name = adapter.name if name is None else name
    _check_can_attach(model, name)
    where = owners(model)
    adapter = check_base(model, adapter, check_fingerprint)
    weights = weights_of(model)
    loras = []
    for key, target in adapter.targets.items():
        # of tied names the model may lack some: a model without its head has the embedding alone
        first, *also = (n for n in (target.target.name, *target.also) if n in where)
        # and where the adapter knows nothing of a tie, the tie holds, as it does in a file
        tied = weights[first].tied if first in weights else ()
        also += [n for n in tied if n not in (*also, *target.apart, target.target.name)]
        if (first, *also) != (target.target.name, *target.also):
            moved = Target(first, target.target.region)
            target = replace(target, target=moved, also=tuple(also))
        owner, tensor = where[first]
        W = base_tensor(owner, tensor)
        factors = {n: t.to(W.device, copy=True) for n, t in adapter.factors(key).items()}
        loras.append((target, factors))
    _put_on(model, where, loras, name, freeze)
    return model


def _check_can_attach(model: nn.Module, adapter: str) -> None:
    if check_name(adapter) in adapter_names(model):
        raise AdapterExistsError(adapter)
    refuse_wrapped(model)


def _fresh_factors(
    planned: PlannedTarget, where: tuple[nn.Module, str], generator: torch.Generator | None
) -> dict[str, Tensor]:
    owner, tensor = where
    W, region = base_tensor(owner, tensor), planned.target.region
    return fresh_tensors(
        planned.settings,
        planned.matrix,
        lambda: _base_of(owner, tensor)[region.index].reshape(planned.matrix),
        dtype=compute_dtype(logical_dtype(W)),
        device=W.device,
        generator=generator,
    )


def _base_of(owner: nn.Module, tensor: str) -> Tensor:
    """What a LoRA attached now would be given as W."""
    W = getattr(owner, tensor)
    return dense(W.base if isinstance(W, AdaptedWeight) else W).detach()


def _put_on(
    model: nn.Module,
    where: Mapping[str, tuple[nn.Module, str]],
    loras: list[tuple[AdapterTarget, dict[str, Tensor]]],
    adapter: str,
    freeze: bool,
) -> None:
    if freeze:
        _freeze(model)
    dress(model)
    fused = {p for m in model.modules() if isinstance(m, _FUSED) for p in m.modules()}
    for target, factors in loras:
        of_vector = logical_shape(base_tensor(*where[target.target.name]))[1:] == ()
        lora = (BuiltLoRA if of_vector else LoRA).of(target, factors, adapter)
        done: set[tuple[int, str]] = set()
        for name in (target.target.name, *target.also):
            owner, tensor = where[name]
            if (id(owner), tensor) not in done:
                done.add((id(owner), tensor))
                register_lora(owner, tensor, lora, fused=owner in fused)


def _freeze(model: nn.Module) -> None:
    """Freeze all but the factors, and remember what was not frozen."""
    factors = {id(p) for s in sites_of(model) for p in s.lora.parameters()}
    names = set(getattr(model, _FROZEN, ()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in factors:
            names.add(_base_name(name))
            parameter.requires_grad = False  # a lazy module's takes no method
    setattr(model, _FROZEN, frozenset(names))


def _restore_frozen(model: nn.Module) -> None:
    """Set requires_grad back on what `apply` froze, once no adapter is left."""
    if next(sites_of(model), None) is not None or not hasattr(model, _FROZEN):
        return
    names = getattr(model, _FROZEN)
    delattr(model, _FROZEN)
    # a chain that began with several tensors may be one by now
    names |= {re.sub(r"\.original\d+$", "", name) for name in names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _base_name(name) in names:
            parameter.requires_grad = True


def _base_name(name: str) -> str:
    """`a.parametrizations.weight.original` → `a.weight`."""
    name = canonical_name(name)
    head, found, tail = name.rpartition("parametrizations.")
    return f"{head}{tail.removesuffix('.original')}" if found else name


def parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """The factors, for an optimizer; one adapter's, or all where None.

    Raises:
        NoAdapterError: no such adapter.
    """
    found = own_sites(sites(model, adapter))
    if not found:
        raise NoAdapterError(adapter, [])
    return [p for s in found for p in s.lora.parameters()]


def param_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, adapter: str | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups with a learning rate `ratio` times as high for B as for the rest.

    B is what leads from the rank to the output: of MiSS, M.

    LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354, §4.

    Example:
        >>> model = apply(nn.Linear(4, 4), ["weight"], rank=2)
        >>> [g["lr"] for g in param_groups(model, lr=1e-4)]
        [0.0001, 0.0016]
    """
    found = own_sites(sites(model, adapter))
    if not found:
        raise NoAdapterError(adapter, [])
    groups: list[dict[str, Any]] = [{"params": [], "lr": lr}, {"params": [], "lr": lr * ratio}]
    for site in found:
        axes = site.lora.settings.axes
        for name, parameter in site.lora.named_parameters():
            is_B = {"out", "rank"} == set(axes[name].split())
            groups[is_B]["params"].append(parameter)
    return groups


def remove(model: Model, adapter: str | None = None) -> Model:
    """Take adapters off and give the exact base back: class, keys, requires_grad, bits.

    Raises:
        NoAdapterError: no such adapter.
        WrappedModelError: the model is sharded by FSDP.
    """
    found = sites(model, adapter)
    if not found:
        raise NoAdapterError(adapter, [])
    inner = unwrapped(model)
    refuse_wrapped(inner)
    detach(inner, found)
    return model


def detach(model: nn.Module, found: Iterable[Site]) -> None:
    """Take LoRAs off their weights, and unfreeze the base when none is left."""
    for group in by_weight(found):
        unregister_loras(group[0].owner, group[0].tensor, [s.lora for s in group])
    undress(model)
    _restore_frozen(model)
