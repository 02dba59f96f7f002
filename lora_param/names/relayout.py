"""An adapter written down for a base that holds the same numbers under other names and shapes.

ΔW stays what it is, element for element. The rows of a fused weight get factors of their own as
slices; a split weight's parts share A; experts are stacked, or taken out of their stack. Where
parts become one matrix, A has the ranks of all and B is block-diagonal, unless they share A: then
they are joined to what they were before they were split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_param.adapter import Adapter, AdapterTarget, LazyTensors
from lora_param.fingerprint import BaseWeight
from lora_param.names.fuse import fuse
from lora_param.names.resolve import Here, Resolution, WholeOf
from lora_param.names.rewritten import Parts, Rewritten, reader
from lora_param.names.split import split
from lora_param.names.stack import stack
from lora_param.names.table import Rule
from lora_param.targets.regions import Target

__all__ = ["relayout"]


def relayout(adapter: Adapter, found: Resolution, shapes: Mapping[str, BaseWeight]) -> Adapter:
    """Write an adapter down for the base that its names were resolved against.

    Args:
        adapter: any.
        found: a complete resolution of the names of its weights.
        shapes: shape and dtype of the base's weights, by name.

    Returns:
        An adapter whose targets are the base's weights, its tensors computed when asked for; the
        same one, where its names are the base's already. What is the same tensor as in its own
        base keeps its fingerprint.

    Raises:
        LayoutError: a target that has no form in the base: it says which, and why.
    """
    if found.is_identity:
        return adapter
    result = Rewritten(adapter, shapes)
    wholes: dict[tuple[str, Rule], Parts] = {}
    for key, t in adapter.targets.items():
        place = found.places[t.target.name]
        if isinstance(place, Here):
            _rename(result, key, t, place, found)
        elif isinstance(place, WholeOf):
            split(result, key, t, place)
        else:
            parts = wholes.setdefault((place.whole, place.rule), {})
            if (place.index, place.expert) in parts:
                raise result.refuse(key, f"{place.whole} has it from two of its targets")
            parts[place.index, place.expert] = key
    for (whole, rule), parts in wholes.items():
        if rule.of_experts:
            stack(result, whole, rule, parts)
        else:
            fuse(result, whole, rule, parts)
    tensors = LazyTensors(result.tensors)
    return replace(adapter, targets=result.targets, tensors=tensors, base=result.base)


def _rename(result: Rewritten, key: str, t: AdapterTarget, place: Here, found: Resolution) -> None:
    def names(old: tuple[str, ...]) -> tuple[str, ...]:
        # a tie is told by the base as often as by the adapter, in names of its own
        places = (found.places.get(n, Here(n) if n in result.shapes else None) for n in old)
        return tuple(p.name for p in places if isinstance(p, Here))

    source = result.source
    target = replace(
        t,
        target=Target(place.name, t.target.region),
        also=names(t.also),
        apart=names(t.apart),
    )
    known = source.base.get(t.target.name)
    if known is not None:
        result.base[place.name] = known
    result.add(target, {n: reader(source, key, n) for n in source.tensor_names(key)})
