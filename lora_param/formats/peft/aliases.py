"""A base whose names begin otherwise than those of the model that PEFT adapted.

PEFT names modules by their paths in the live model; a checkpoint may have them under another
prefix. The base is read under the adapter's names, and what was settled gets the base's own again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from lora_param.adapter import Adapter, Host, LazyTensors
from lora_param.formats.peft.config import PeftConfig
from lora_param.formats.peft.keys import Keys
from lora_param.names.resolve import Here, resolve
from lora_param.targets.regions import Target

__all__ = ["renamed", "under_their_names"]


def under_their_names(host: Host, keys: Keys, config: PeftConfig) -> tuple[Host, dict[str, str]]:
    """The base as the adapter names its weights, and the base's own name of each that differs."""
    wanted = [n for n in _names(keys, config) if n not in host.weights]
    if not wanted:
        return host, {}
    places = resolve(wanted, host.weights).places
    own = {theirs: p.name for theirs, p in places.items() if isinstance(p, Here)}
    if not own:
        return host, {}
    weights = {**host.weights, **{n: replace(host.weights[o], name=n) for n, o in own.items()}}
    return Host(host.name, weights, lambda name: host.value(own.get(name, name))), own


def _names(keys: Keys, config: PeftConfig) -> Iterable[str]:
    """Every name that a key may mean."""
    for layer in keys.layers:
        leaves = ("weight", "in_proj_weight", *config.parameters(layer.module))
        yield from (f"{layer.module}.{leaf}" for leaf in leaves)
        if "bias" in layer.parts:
            yield f"{layer.module}.bias"
    yield from (f"{module}.weight" for module in keys.tokens)
    yield from keys.copies


def renamed(adapter: Adapter, own: Mapping[str, str]) -> Adapter:
    """The adapter with the base's own names."""
    if not own:
        return adapter
    targets, keys = {}, {}
    for key, t in adapter.targets.items():
        name = own.get(t.target.name, t.target.name)
        also = tuple(own.get(n, n) for n in t.also)
        apart = tuple(own.get(n, n) for n in t.apart)
        target = Target(name, t.target.region)
        keys[key] = str(target)
        targets[str(target)] = replace(t, target=target, also=also, apart=apart)
    base = {own.get(n, n): b for n, b in adapter.base.items()}
    makers = {
        f"{keys[key]}.{name}": partial(adapter.tensors.__getitem__, f"{key}.{name}")
        for key in adapter.targets
        for name in adapter.tensor_names(key)
    }
    return replace(adapter, targets=targets, tensors=LazyTensors(makers), base=base)
