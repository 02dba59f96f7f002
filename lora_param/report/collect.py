"""From weights and adapters to the rows of `Stats`. Live models and files come in alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_param.adapter import Adapter, AdapterTarget, is_dead
from lora_param.report.norms import measure
from lora_param.report.stats import Stats, TargetRow, WeightRow
from lora_param.targets.settings import INITIAL
from lora_param.targets.weights import Weight, count_base
from lora_param.weight.blocks import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Progress", "as_array", "collect"]

Array = NDArray[np.floating[Any]]
Progress = Callable[[int, int, str], None]
Blocks = Callable[[str, int, int], Iterable[Array]]


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
    base_blocks: Blocks | None = None,
    *,
    source: str = "",
    name: str = "",
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
        base_blocks: gives a range of a weight's elements, flattened, a block at a time; where it is
            at hand, no weight is in memory as a whole unless its update depends on it.
        source: what it is about.
        name: what the base is called, or the adapter where it is alone.
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
            row = _row(adapter, key, base_array, base_blocks, measured)
            rows.append(row)
            for weight in (adapter.targets[key].target.name, *row.also):
                on_weight.setdefault(weight, []).append(key)
            if progress:
                progress(len(rows), total, key)
    listed = tuple(
        WeightRow(w.name, w.shape, w.dtype, w.numel, tuple(on_weight.get(w.name, ())), w.quantized)
        for w in (weights or {}).values()
    )
    base = count_base(weights) if weights is not None else 0
    return Stats(tuple(rows), base, listed, source, tuple(notes), unfrozen, name)


def _row(
    adapter: Adapter,
    key: str,
    base_array: Callable[[str], Array] | None,
    base_blocks: Blocks | None,
    measured: bool,
) -> TargetRow:
    target, base = adapter.targets[key], adapter.base[adapter.targets[key].target.name]
    name, region, settings = target.target.name, target.target.region, target.settings
    factors = _factors(adapter, key)
    scale = target.scale * target.strength
    norm = rank = spectrum = weight_norm = None
    if measured:
        pair = factors if "lora_A" in factors else _lowered(target, factors, base.shape)
        if pair is None:
            norm = _norm_without_base(target, factors, region.matrix(base.shape))
        else:
            norm, rank, spectrum = measure(*_joined(pair), scale)
    if base_array is not None:
        built = measured and settings.variant != "lora"
        flat = None if built or base_blocks is None else region.flat(base.shape)
        if flat is not None and base_blocks is not None:
            weight_norm = _norm(base_blocks(name, *flat))
        else:
            values = base_array(name)[region.index]
            weight_norm = _norm(_blocks(values))
        if built:
            wide = values.astype(np.float64).reshape(region.matrix(base.shape))
            norm = _norm_of_delta(target, factors, wide)
    dead = is_dead(factors, norm, weight_norm)
    if dead and norm is not None:
        norm = 0.0
    return TargetRow(
        key,
        base.shape,
        base.dtype,
        adapter.name,
        settings.rank,
        settings.alpha,
        scale,
        target.enabled,
        sum(t.size for n, t in factors.items() if n not in INITIAL),
        dead,
        norm,
        weight_norm,
        rank,
        target.also,
        spectrum,
        settings.variant,
    )


def _joined(factors: Mapping[str, Array]) -> tuple[Array, Array]:
    """A and B; with an initial pair B @ A - initial_B @ initial_A, as one of twice the rank."""
    A, B, *initial = (factors[n] for n in (*INITIAL.values(), *INITIAL) if n in factors)
    if not initial:
        return A, B
    return np.concatenate([A, initial[0]], -2), np.concatenate([B, -initial[1]], -1)


def _blocks(values: Array) -> Iterator[Array]:
    flat = values.reshape(-1)
    return (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK))


def _norm(parts: Iterable[Array]) -> float:
    """‖W‖: a few rows at a time in the precision it has, and their sum exactly."""
    return math.sqrt(math.fsum(map(_square, parts)))


def _square(part: Array) -> float:
    """‖part‖², in fp64 where its own precision overflows."""
    with np.errstate(over="ignore"):
        found = float(np.dot(part, part))
    if math.isfinite(found) or part.dtype == np.float64:
        return found
    return _square(part.astype(np.float64))


def _lowered(
    target: AdapterTarget, factors: Mapping[str, Array], shape: tuple[int, ...]
) -> dict[str, Array] | None:
    """A and B of a variant that keeps other tensors, for its scale; None where it has none."""
    import torch

    from lora_param.weight.variants import variant_of

    variant = variant_of(target.settings)
    if variant.needs_W:
        return None
    W = torch.empty(target.target.region.matrix(shape), device="meta")
    tensors = {n: torch.from_numpy(np.asarray(t)) for n, t in factors.items()}
    form = variant.lower(W, tensors, 1.0, 1.0)
    return form and {"lora_A": form.A.numpy(), "lora_B": form.B.numpy()}


def _norm_without_base(
    target: AdapterTarget, factors: Mapping[str, Array], matrix: tuple[int, ...]
) -> float | None:
    """‖ΔW‖ of a variant that has no A and B, where W has no part in it."""
    from lora_param.weight.variants import variant_of

    if variant_of(target.settings).needs_W:
        return None
    return _norm_of_delta(target, factors, np.zeros(matrix))


def _norm_of_delta(target: AdapterTarget, factors: Mapping[str, Array], W: Array) -> float:
    """‖ΔW‖ of a variant whose update depends on W, in fp64. W (*, out, in)"""
    import torch

    from lora_param.weight.update import fold_initial
    from lora_param.weight.variants import variant_of

    tensors = {n: torch.from_numpy(np.asarray(t, np.float64)) for n, t in factors.items()}
    delta = variant_of(target.settings).delta(
        torch.from_numpy(W), fold_initial(tensors), target.scale, target.strength
    )
    return float(torch.linalg.vector_norm(delta))


def _factors(adapter: Adapter, key: str) -> dict[str, Array]:
    read = getattr(adapter.tensors, "array", None)  # a file gives arrays without torch
    if read is None:
        return {name: as_array(t) for name, t in adapter.factors(key).items()}
    return {n: read(f"{key}.{n}") for n in adapter.tensor_names(key)}
