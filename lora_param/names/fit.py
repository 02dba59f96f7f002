"""An adapter for a base whose names are other ones: found, written down anew, and accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lora_param.adapter import Adapter, Host
from lora_param.errors import MismatchError
from lora_param.fingerprint import BaseWeight
from lora_param.names.relayout import relayout
from lora_param.names.resolve import Here, Resolution, WholeOf, resolve
from lora_param.targets.weights import Weight

__all__ = ["fitted"]


def fitted(adapter: Adapter, host: Host) -> Adapter:
    """The adapter as it is written for this base; what had to be done is in its notes.

    Args:
        adapter: any, settled.
        host: the base, and the rules between names.

    Returns:
        The same adapter, where every name is the base's own.

    Raises:
        MismatchError: a weight that stands nowhere in the base; both sides are listed, and the
            rule that comes nearest.
        LayoutError: a target without a form in the base's layout.
    """
    wanted = [n for t in adapter.targets.values() for n in (t.target.name, *t.also)]
    if all(name in host.weights for name in wanted):
        return adapter
    found = resolve(wanted, host.weights, host.names, host.model_type)
    lost = [k for k, t in adapter.targets.items() if t.target.name not in found.places]
    if lost:
        raise _mismatch(adapter, host.weights, host.name, found, lost)
    shapes = {n: BaseWeight(w.shape, w.dtype) for n, w in host.weights.items()}
    new = relayout(adapter, found, shapes)
    return replace(new, notes=(*adapter.notes, *_told(adapter, found)))


def _mismatch(
    adapter: Adapter,
    base: Mapping[str, Weight],
    base_name: str,
    found: Resolution,
    lost: list[str],
) -> MismatchError:
    names = [adapter.targets[k].target.name for k in lost]
    shapes = [
        f"{n} could be any of {', '.join(found.ambiguous[n])}"
        for n in names
        if n in found.ambiguous
    ]
    for name in names:
        if name in found.partial:
            rule, lacking = found.partial[name]
            shapes.append(f"{name} by the rule {rule.text!r}, for which {lacking} is missing")
    taken = {p.name for p in found.places.values() if isinstance(p, Here)}
    return MismatchError(
        adapter.source,
        base_name,
        unexpected=lost,
        missing=[n for n, w in base.items() if n not in taken and not w.unsuitable],
        shapes=shapes,
        matched=len(adapter.targets) - len(lost),
        wanted=len(adapter.targets),
    )


def _told(adapter: Adapter, found: Resolution) -> list[str]:
    counts: Counter[str] = Counter()
    for t in adapter.targets.values():
        place, name = found.places[t.target.name], t.target.name
        if isinstance(place, Here):
            same = "under their own names" if place.name == name else "under another name"
            counts[same] += 1
        else:
            verb = "split" if isinstance(place, WholeOf) else "put together"
            counts[f"{verb} by {place.rule.text!r}"] += 1
    total = len(adapter.targets)
    return [f"{n} of {total} targets {how}." for how, n in counts.items()]
