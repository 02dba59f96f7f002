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
from lora_param.names.resolve import Here, PartOf, WholeOf, resolve
from lora_param.targets.regions import Target
from lora_param.targets.weights import Weight

__all__ = ["renamed", "under_their_names"]


def under_their_names(
    host: Host, keys: Keys, config: PeftConfig, factors: Mapping[str, tuple[int, ...]]
) -> tuple[Host, dict[str, str]]:
    """The base as the adapter names its weights, and the base's own name of each that differs.

    What the base has fused, split or stacked is listed as the weight that the adapter means: its
    targets are settled as that, and written down for the base by `names.fitted`.

    Args:
        factors: (out, in) of the adapter's matrices, by the name of the weight.
    """
    wanted = [n for n in _names(keys, config) if n not in host.weights]
    if not wanted:
        return host, {}
    places = resolve(wanted, host.weights, host.names, host.model_type).places
    own = {theirs: p.name for theirs, p in places.items() if isinstance(p, Here)}
    weights = {**host.weights, **{n: replace(host.weights[o], name=n) for n, o in own.items()}}
    for name, place in places.items():
        if isinstance(place, PartOf) and name in factors:
            weights[name] = Weight(name, factors[name])
        elif isinstance(place, WholeOf):
            weights[name] = _whole(name, place, host.weights)
    if len(weights) == len(host.weights):
        return host, {}
    return replace(host, weights=weights, value=lambda n: host.value(own.get(n, n))), own


def _whole(name: str, place: WholeOf, weights: Mapping[str, Weight]) -> Weight:
    """A weight as it would be, were the base's parts of it in one tensor."""
    shapes = [weights[part].shape for part in place.parts[0]]
    rows, columns = sum(s[0] for s in shapes), shapes[0][1]
    turned = place.rule.transposed
    matrix = (columns, rows) if turned else (rows, columns)
    if not place.rule.of_experts:
        return Weight(name, matrix)
    return Weight(name, (len(place.parts), *matrix), in_first=turned)


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
