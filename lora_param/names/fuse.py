"""Parts of the adapter's that are one tensor in the base: slices of it, or joined again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.names.rewritten import Makers, Parts, Rewritten, reader, share_A
from lora_param.names.table import Rule
from lora_param.targets.regions import WHOLE, Region, Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fuse"]


def fuse(result: Rewritten, whole: str, rule: Rule, parts: Parts) -> None:
    """q, k and v become slices of qkv; those that share A become the one they were.

    Raises:
        LayoutError: it cannot be told which rows they are, or they are no range of rows.
    """
    adapter, shape = result.source, result.shapes[whole].shape
    keys = {i: key for (i, _), key in parts.items()}
    targets = {i: adapter.targets[key] for i, key in keys.items()}
    sizes = {i: _rows_of(adapter, key) for i, key in keys.items()}
    starts = _starts(rule, sizes, shape[0])
    if starts is None:
        raise result.refuse(keys[min(keys)], f"which rows of {whole} it is cannot be told")
    joined = len(keys) == len(rule.parts) and share_A(adapter, list(keys.values()))
    if joined and all(targets[i].target.region == WHOLE for i in targets) and _alike(targets):
        _join(result, whole, rule, [keys[i] for i in sorted(keys)])
        return
    if rule.interleaved:
        raise result.refuse(keys[min(keys)], f"its rows take turns with others in {whole}")
    for i, key in keys.items():
        region = targets[i].target.region
        if region.stacked or region.columns is not None:
            raise result.refuse(key, f"a part of it alone is adapted, and it is rows of {whole}")
        first, last = region.rows or (0, sizes[i])
        start = starts[i]
        moved = Target(whole, Region(rows=(start + first, start + last)))
        made = {n: reader(adapter, key, n) for n in adapter.tensor_names(key)}
        result.add(replace(targets[i], target=moved, also=(), apart=()), made)


def _rows_of(adapter: Adapter, key: str) -> int:
    """Rows of the whole weight behind a target."""
    t = adapter.targets[key]
    known = adapter.base.get(t.target.name)
    if known is not None:
        return known.shape[0]
    for name, axes in t.settings.axes.items():
        if "out" in axes.split():
            return int(adapter.tensors[f"{key}.{name}"].shape[axes.split().index("out")])
    raise AssertionError(t.settings.variant)


def _starts(rule: Rule, sizes: Mapping[int, int], total: int) -> dict[int, int] | None:
    """The first row of each part, the sizes of some being known; None where they do not tell."""
    known = dict(sizes)
    count = len(rule.parts)
    for i in (*range(1, count), *range(count - 1, 0, -1)):
        if rule.parts[i].equal:
            size = known.get(i, known.get(i - 1))
            if size is not None:
                known[i] = known[i - 1] = size
    open_ = [i for i in range(count) if i not in known]
    if len(open_) == count and all(p.equal for p in rule.parts[1:]):
        known = dict.fromkeys(range(count), total // count)
    elif len(open_) == 1:
        known[open_[0]] = total - sum(known.values())
    starts: dict[int, int] = {}
    for i in sizes:
        before = [known.get(j) for j in range(i)]
        after = [known.get(j) for j in range(i, count)]
        if None not in before:
            starts[i] = sum(n for n in before if n is not None)
        elif None not in after:
            starts[i] = total - sum(n for n in after if n is not None)
        else:
            return None
    if len(known) == count and (sum(known.values()) != total or min(known.values()) < 1):
        return None
    return starts


def _alike(targets: Mapping[int, AdapterTarget]) -> bool:
    first, *rest = targets.values()
    return all(
        (t.settings, t.strength, t.enabled) == (first.settings, first.strength, first.enabled)
        for t in rest
    )


def _join(result: Rewritten, whole: str, rule: Rule, keys: list[str]) -> None:
    import torch

    adapter = result.source

    def rows(name: str) -> Tensor:
        parts = [adapter.tensors[f"{k}.{name}"] for k in keys]
        if rule.interleaved:
            return torch.stack(parts, 1).flatten(0, 1)
        return torch.cat(parts)

    first = adapter.targets[keys[0]]
    axes = first.settings.all_axes
    made: Makers = {
        name: partial(rows, name) if "out" in axes[name] else reader(adapter, keys[0], name)
        for name in adapter.tensor_names(keys[0])
    }
    result.add(replace(first, target=Target(whole), also=(), apart=()), made)
