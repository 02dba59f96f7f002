"""Between a model's adapter and the format-neutral record of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from lora_param.adapter import Adapter, AdapterTarget, Host, check_fit
from lora_param.errors import DuplicateTargetError, MismatchError, listed
from lora_param.fingerprint import BaseWeight, hash_sample, tensor_base_weight
from lora_param.model.chains import chain_of, originals_of
from lora_param.model.held import enabled_outside, switch_lora
from lora_param.model.lora import LoRA
from lora_param.model.sites import base_tensor, own_sites, owners, sites, unwrapped
from lora_param.model.weights import config_of, weights_of
from lora_param.names.fit import fitted
from lora_param.targets.regions import Target
from lora_param.weight.base import dense

__all__ = [
    "check_base",
    "fingerprint",
    "for_model",
    "get_adapter",
    "host_of",
    "load_into",
    "record_to_save",
]


def fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, BaseWeight]:
    """Fingerprints of the base weights of these names, of those that the model has."""
    where = owners(model)
    return {n: _fingerprint(*where[n]) for n in dict.fromkeys(names) if n in where}


def _fingerprint(owner: nn.Module, tensor: str) -> BaseWeight:
    """Of W; where it is itself computed of several tensors, the hash is of those."""
    found = tensor_base_weight(dense(base_tensor(owner, tensor)))
    if tensor in owner._parameters or chain_of(owner, tensor).is_tensor:
        return found
    originals = originals_of(chain_of(owner, tensor)).values()  # the same bits on every device
    hashes = [tensor_base_weight(t).hash for t in originals]
    known = [h for h in hashes if h is not None]
    whole = hash_sample("".join(known).encode()) if len(known) == len(hashes) else None
    return replace(found, hash=whole)


def host_of(model: nn.Module) -> Host:
    """The model's base, as an adapter of another tool is settled for it."""
    where = owners(model)

    def value(name: str) -> Tensor:
        return dense(base_tensor(*where[name])).detach()

    kind = getattr(getattr(model, "config", None), "model_type", None)
    return Host("the model", weights_of(model), value, kind, config=config_of(model))


def for_model(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter as it is written for this model, with all settled that its file leaves open.

    Raises:
        MismatchError: a name that stands nowhere in the model.
        LayoutError: a target without a form in the model's layout.
    """
    where = owners(model)
    if adapter.settle is None and all(t.target.name in where for t in adapter.targets.values()):
        return adapter
    host = replace(host_of(model), names=adapter.names)
    adapter = fitted(adapter if adapter.settle is None else adapter.on(host), host)
    adapter.check_finite()  # nobody has looked at it yet
    return adapter


def check_base(model: nn.Module, adapter: Adapter, check_fingerprint: bool) -> Adapter:
    """Check that an adapter fits the model's base, as `check_fit` does.

    Returns:
        The adapter, with all settled that its file leaves open.
    """
    adapter = for_model(model, adapter)
    names = (n for t in adapter.targets.values() for n in (t.target.name, *t.also, *t.apart))
    base = fingerprint(model, names)
    check_fit(adapter, base, "the model", check_fingerprint=check_fingerprint)
    return adapter


def get_adapter(model: nn.Module, name: str = "default") -> Adapter:
    """The format-neutral record of an adapter on a model; its tensors are the live ones.

    Raises:
        NoAdapterError: no adapter of that name.
    """
    model = unwrapped(model)
    found = sites(model, name)
    weights = weights_of(model)
    names_of: dict[int, list[str]] = {}
    for site in found:
        names_of.setdefault(id(site.lora), []).append(site.name)
    targets: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    for site in own_sites(found):
        lora, names = site.lora, names_of[id(site.lora)]
        if site.key in targets:
            raise DuplicateTargetError(site.key, name)
        targets[site.key] = AdapterTarget(
            Target(site.name, site.lora.region),
            lora.settings,
            lora.strength,
            lora.enabled,
            also=tuple(names[1:]),
            apart=tuple(n for n in weights[site.name].tied if n not in names),
        )
        tensors |= {f"{site.key}.{n}": t for n, t in lora.factors().items()}
    base = fingerprint(model, (t.target.name for t in targets.values()))
    source = f"the adapter {name!r} of the model"
    config = config_of(model)
    return Adapter(
        targets, tensors, base, name, source, weights_at_hand=weights, config_at_hand=config
    )


def record_to_save(model: nn.Module, name: str) -> Adapter:
    """The record of an adapter as it is outside of any `disabled` block, which is for a while."""
    found = own_sites(sites(unwrapped(model), name))
    enabled = {s.key: enabled_outside(s.lora) for s in found}
    record = get_adapter(model, name)
    targets = {k: replace(t, enabled=enabled[k]) for k, t in record.targets.items()}
    return replace(record, targets=targets)


def load_into(
    model: nn.Module, adapter: Adapter, name: str, *, strict: bool, check_fingerprint: bool
) -> None:
    """Overwrite an adapter on the model with a record of the same targets and ranks.

    Raises:
        MismatchError: targets that only one side has (unless strict is False), or other shapes.
    """
    adapter = for_model(unwrapped(model), adapter)
    mine = {s.key: s for s in own_sites(sites(model, name))}
    missing = [k for k in mine if k not in adapter.targets]
    unexpected = [k for k in adapter.targets if k not in mine]
    both = [k for k in adapter.targets if k in mine]
    factors = {k: adapter.factors(k) for k in both}
    differing: dict[str, list[str]] = {}
    for k in both:
        told = _difference(adapter.targets[k], factors[k], mine[k].lora)
        if told:
            differing.setdefault(told, []).append(k)
    if differing or (strict and (missing or unexpected)) or not both:
        raise MismatchError(
            adapter.source,
            f"the adapter {name!r} of the model",
            missing=missing,
            unexpected=unexpected,
            shapes=[f"{told}, of {listed(keys, 2)}" for told, keys in differing.items()],
            matched=len(both) - sum(map(len, differing.values())),
            wanted=len(mine),
        )
    known = replace(adapter, targets={k: adapter.targets[k] for k in both})
    check_base(unwrapped(model), known, check_fingerprint)
    if missing or unexpected:
        warnings.warn(
            f"{adapter.source}: {len(both)} targets loaded; {len(unexpected)} of the file's and "
            f"{len(missing)} of the model's had no counterpart",
            stacklevel=3,
        )
    for key in both:
        lora, target = mine[key].lora, adapter.targets[key]
        lora.configure(target.settings, target.strength)
        switch_lora(lora, target.enabled)
        lora.copy_factors(factors[key])


def _difference(target: AdapterTarget, factors: dict[str, Tensor], lora: LoRA) -> str | None:
    """Why a target of a record cannot be written over one on the model, or None."""
    theirs, own = target.settings, lora.settings
    if theirs.variant != own.variant:
        return f"variant {theirs.variant} in the file, {own.variant} here"
    if set(theirs.axes) != set(own.axes):
        return f"{own.variant} of form {theirs.form!r} in the file, {own.form!r} here"
    if theirs.rank != own.rank:
        return f"rank {theirs.rank} in the file, {own.rank} here"
    for name, tensor in factors.items():
        shape = tuple(tensor.shape)
        mine = getattr(lora, name)
        if not name.startswith("initial_") and shape != tuple(mine.shape):
            return f"{name} is {shape} in the file, {tuple(mine.shape)} here"
    return None
