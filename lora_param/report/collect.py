"""From weights and adapters to the rows of `Stats`. Live models and files come in alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_param.adapter import TENSORS, Adapter
from lora_param.report.norms import decomposed_norm, measure
from lora_param.report.rows import Stats, TargetRow, WeightRow
from lora_param.targets.weights import Weight, count_base

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Progress", "as_array", "collect"]

_ROUNDING = 1e-5  # of ‖W‖: what rounding alone makes of a magnitude that was never trained
Array = NDArray[np.floating[Any]]
Progress = Callable[[int, int, str], None]


def as_array(tensor: Tensor) -> Array:
    """A torch tensor as a NumPy array, low precisions as float32; NaN for one without data."""
    if tensor.is_meta:
        return np.broadcast_to(np.float32(np.nan), tuple(tensor.shape))
    tensor = tensor.detach().cpu()
    if tensor.element_size() < 4:
        tensor = tensor.float()
    array: Array = tensor.numpy()
    return array


def collect(
    weights: Mapping[str, Weight] | None,
    adapters: Iterable[Adapter],
    base_array: Callable[[str], Array] | None = None,
    *,
    source: str = "",
    notes: Iterable[str] = (),
    unfrozen: int = 0,
    measured: bool = True,
    progress: Progress | None = None,
) -> Stats:
    """Put together what there is to say.

    Args:
        weights: the base's weights, or None where only an adapter is at hand.
        adapters: what is on it, or in the file.
        base_array: gives a weight's values, for ‖W‖; None where they are not to be read.
        source: what it is about.
        notes: sentences to show with it.
        unfrozen: number of base elements that train.
        measured: compute ‖ΔW‖ and effective rank.
        progress: called with targets done, targets in all and the target's name.
    """
    adapters = list(adapters)
    total = sum(len(a.targets) for a in adapters)
    rows: list[TargetRow] = []
    on_weight: dict[str, list[str]] = {}
    for adapter in adapters:
        for key in adapter.targets:
            row = _row(adapter, key, base_array, measured)
            rows.append(row)
            for name in (adapter.targets[key].target.name, *row.also):
                on_weight.setdefault(name, []).append(key)
            if progress:
                progress(len(rows), total, key)
    listed = tuple(
        WeightRow(w.name, w.shape, w.dtype, w.numel, tuple(on_weight.get(w.name, ())))
        for w in (weights or {}).values()
    )
    base = count_base(weights) if weights is not None else 0
    return Stats(tuple(rows), base, listed, source, tuple(notes), unfrozen)


def _row(
    adapter: Adapter, key: str, base_array: Callable[[str], Array] | None, measured: bool
) -> TargetRow:
    target, base = adapter.targets[key], adapter.base[adapter.targets[key].target.name]
    name, region = target.target.name, target.target.region
    factors = _factors(adapter, key)
    down, up = factors["lora_A"], factors["lora_B"]
    norm = rank = spectrum = weight_norm = None
    if measured:
        norm, rank, spectrum = measure(
            down, up, target.scale, factors.get("initial_A"), factors.get("initial_B")
        )
    if base_array is not None:
        values = base_array(name)[region.index].astype(np.float64)
        weight_norm = float(np.sqrt((values**2).sum()))
        if measured and "magnitude" in factors:
            norm = decomposed_norm(
                values.reshape(region.matrix(base.shape)),
                down,
                up,
                target.settings.scale,
                factors["magnitude"],
                target.strength,
                factors.get("initial_A"),
                factors.get("initial_B"),
            )
            if norm <= _ROUNDING * weight_norm:
                norm = 0.0
    if "initial_A" in factors:
        dead = np.array_equal(down, factors["initial_A"]) and np.array_equal(
            up, factors["initial_B"]
        )
    else:
        dead = not up.any()
    if "magnitude" in factors and norm is not None:
        dead = dead and not norm
    return TargetRow(
        key,
        base.shape,
        base.dtype,
        adapter.name,
        target.settings.rank,
        target.settings.alpha,
        target.scale,
        target.enabled,
        sum(t.size for n, t in factors.items() if not n.startswith("initial_")),
        dead,
        norm,
        weight_norm,
        rank,
        target.also,
        spectrum,
        target.settings.variant,
    )


def _factors(adapter: Adapter, key: str) -> dict[str, Array]:
    read = getattr(adapter.tensors, "array", None)  # a file gives arrays without torch
    if read is None:
        return {name: as_array(t) for name, t in adapter.factors(key).items()}
    return {n: read(f"{key}.{n}") for n in TENSORS if f"{key}.{n}" in adapter.tensors}
