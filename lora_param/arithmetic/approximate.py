"""An adapter as plain LoRA: what has another form becomes the nearest of its own rank, or goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, Host
from lora_param.arithmetic.combine import Compressed
from lora_param.errors import UnsettledError
from lora_param.formats.base import PLAIN
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["approximate"]


def approximate(
    adapter: Adapter,
    host: Host | None,
    keep: Callable[[AdapterTarget], bool],
    *,
    exact: Collection[str] = PLAIN,
    rank: int | None = None,
    report: Callable[[Compressed], None] | None = None,
) -> Adapter:
    """The adapter as factors alone, with what that loses.

    Args:
        adapter: any, settled for its base.
        host: the base, on which the update of some variants depends.
        keep: a target has a form where the adapter goes; the others, and full copies, are dropped.
        exact: the variants that stay what they are, unless a rank is asked for.
        rank: of all targets; by default each keeps its own.
        report: called with what became of each target that is not exactly what it was; the error
            of one that was dropped is 1.

    Returns:
        A record of plain LoRA; what is disabled takes no part.

    Raises:
        UnsettledError: an update depends on W, and there is no base.
    """
    targets: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    for key, t in adapter.targets.items():
        if not t.enabled:
            continue
        before = t.settings.rank
        if t.settings.variant == "copy" or not keep(t):
            if report:
                report(Compressed(key, before, 0, 1.0))
            continue
        if t.settings.variant in exact and (rank is None or rank == before):
            targets[key] = t
            tensors |= {f"{key}.{n}": f for n, f in adapter.factors(key).items()}
            continue
        A, B, error = _nearest(adapter, host, key, before if rank is None else rank)
        settings = Settings(rank=A.shape[-2], alpha=float(A.shape[-2]), dropout=t.settings.dropout)
        targets[key] = replace(t, settings=settings, strength=1.0)
        tensors |= {f"{key}.lora_A": A, f"{key}.lora_B": B}
        if report:
            report(Compressed(key, before, A.shape[-2], error))
    return replace(adapter, targets=targets, tensors=tensors)


def _nearest(
    adapter: Adapter, host: Host | None, key: str, rank: int
) -> tuple[Tensor, Tensor, float]:
    """A and B of the best approximation of ΔW, and ‖lost‖ / ‖ΔW‖."""
    import torch

    from lora_param.weight.lowrank import Kept, factorize, reduce_product
    from lora_param.weight.precision import compute_dtype
    from lora_param.weight.update import fold_initial
    from lora_param.weight.variants import variant_of

    t = adapter.targets[key]
    variant = variant_of(t.settings)
    scale, region = t.scale, t.target.region
    tensors = fold_initial(
        {n: f.detach().cpu().to(compute_dtype(f.dtype)) for n, f in adapter.factors(key).items()}
    )
    shape = region.matrix(adapter.base[t.target.name].shape)
    keep = Kept(rank=rank)
    if t.settings.variant == "lora":
        low = reduce_product(tensors["lora_A"], tensors["lora_B"] * (scale * t.strength), keep)
    else:
        if host is None and variant.needs_W:
            raise UnsettledError(
                adapter.source,
                [key],
                f"the weights on which an update of variant {t.settings.variant} depends",
            )
        if variant.needs_W:
            assert host is not None
            W = host.value(t.target.name).detach().cpu()[region.index]
            W = W.to(torch.promote_types(W.dtype, torch.float32)).reshape(shape)  # (*, m, n)
        else:
            W = torch.zeros(()).expand(shape)
        low = factorize(variant.delta(W, dict(tensors), scale, t.strength), keep)
    return low.A, low.B, math.sqrt(max(0.0, 1 - low.energy))
