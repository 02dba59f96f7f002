"""Adapters of lower rank, on the factors alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.arithmetic.combine import Compressed
from lora_param.arithmetic.pairs import pair_of
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["resize"]


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    report: Callable[[Compressed], None] | None = None,
) -> Adapter:
    """An adapter of lower rank: for each target the best that there is for its product.

    Args:
        adapter: of plain LoRA; pissa's and olora's initial pairs are joined to the factors.
        rank: the most that a target keeps.
        energy: the share of ‖ΔW‖² to keep; each target keeps the fewest that hold it.
        error: the same, as a share of ‖ΔW‖ that may be lost.
        report: called with what became of each target.

    Returns:
        A new record with scale 1; what is enabled stays so.

    Raises:
        OptionError: not one of rank, energy and error, or a value out of range.
        VariantError: an update is not of the form scale·(B @ A).

    >>> resize(adapter, energy=0.99)  # doctest: +SKIP
    """
    from lora_param.weight.lowrank import Kept, reduce_product

    keep = Kept(rank, energy, error)
    targets: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    for key, t in adapter.targets.items():
        pair = pair_of(adapter, key, "resize")
        low = reduce_product(pair.A, pair.B * pair.scale, keep)
        settings = Settings(dropout=t.settings.dropout).at(low.A.shape[-2], 1.0)
        targets[key] = replace(t, settings=settings, strength=1.0)
        tensors |= {f"{key}.lora_A": low.A, f"{key}.lora_B": low.B}
        if report:
            lost = math.sqrt(max(0.0, 1 - low.energy))
            report(Compressed(key, pair.A.shape[-2], low.A.shape[-2], lost))
    return replace(adapter, targets=targets, tensors=tensors)
