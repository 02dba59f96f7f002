"""Sums of adapters: on the factors, never on an m × n matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.arithmetic.pairs import Pair, pair_of
from lora_param.errors import MismatchError, OptionError, OverlapError, listed
from lora_param.fingerprint import BaseWeight
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_param.weight.lowrank import Kept

__all__ = ["METHODS", "Compressed", "check_options", "combine"]

METHODS = ("cat", "svd", "linear", "ties", "dare", "core-space")
_THINNING = ("ties", "dare", "core-space")
_DENSITY = 0.5


@dataclass(frozen=True, slots=True)
class Compressed:
    """What became of one target.

    Attributes:
        target: its key.
        before: rank of what was given, of all adapters together.
        rank: rank of the result.
        error: ‖lost‖ / ‖ΔW‖; None where the method is not an approximation of the sum.
    """

    target: str
    before: int
    rank: int
    error: float | None


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    adapter: str = "default",
    report: Callable[[Compressed], None] | None = None,
) -> Adapter:
    """The weighted sum of adapters, as one adapter.

    Args:
        adapters: on the same base; their targets and ranks may differ. What is disabled in one
            takes no part.
        weights: one for each, of any sign.
        method: how.
            "cat": exact; the ranks are added up.
            "svd": the best of rank `rank` (by default the highest that was given).
            "linear": A and B added up by themselves, each with the root of its weight; of equal
            ranks. Cheap, and with cross terms: what PEFT calls linear.
            "ties": as "linear", after each factor lost its smallest elements and the signs of
            the majority (Yadav et al. 2023, https://arxiv.org/abs/2306.01708).
            "dare": as "linear", after a random part of each factor's elements was dropped and
            the others scaled up (Yu et al. 2024, https://arxiv.org/abs/2311.03099).
            "core-space": "ties" in the space that all factors span, where the updates are small
            matrices (Panariello et al. 2025, https://arxiv.org/abs/2509.17786).
        rank: compress the result to this rank, for any method.
        density: for ties, dare and core-space, the share of elements that stays, 0.5 by default.
        seed: of dare's draws.
        adapter: the name of the result.
        report: called with what became of each target.

    Returns:
        An adapter of plain LoRA with scale 1; of a single adapter with weight 1, and no rank
        asked for, that adapter.

    Raises:
        OptionError: an unknown method, other numbers of weights, or a value out of range.
        VariantError: an update is not of the form scale·(B @ A).
        MismatchError: the adapters are on bases of other shapes, or ranks differ for "linear".
        OverlapError: targets that are not the same part of a weight, and yet meet.

    >>> combine([a, b], [0.7, 0.3]).name  # doctest: +SKIP
    'default'
    """
    from lora_param.weight.lowrank import Kept

    check_options(method, rank, density)
    density = _DENSITY if density is None else density
    _check(adapters, weights)
    if len(adapters) == 1 and weights[0] == 1 and rank is None and method == "cat":
        return replace(adapters[0], name=adapter)
    keep = None if rank is None else Kept(rank=rank)
    targets: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    for key, holders in _targets(adapters).items():
        pairs = [(pair_of(adapters[i], key, f"combine ({method})"), weights[i]) for i in holders]
        highest = max(p.A.shape[-2] for p, _ in pairs)
        own = keep or (Kept(rank=highest) if method == "svd" else None)
        pair, error = _combined(key, pairs, method, own, density, seed)
        pair = Pair(pair.A.contiguous(), (pair.B * pair.scale).contiguous(), 1.0)
        first = adapters[holders[0]].targets[key]
        targets[key] = AdapterTarget(
            first.target, Settings().at(pair.A.shape[-2], 1.0), also=first.also, apart=first.apart
        )
        tensors |= {f"{key}.lora_A": pair.A, f"{key}.lora_B": pair.B}
        if report:
            before = sum(p.A.shape[-2] for p, _ in pairs)
            report(Compressed(key, before, pair.A.shape[-2], error))
    base: dict[str, BaseWeight] = {}
    for one in reversed(adapters):
        base |= one.base
    wanted = {t.target.name for t in targets.values()}
    sources = ", ".join(a.source for a in adapters)
    return Adapter(
        targets,
        tensors,
        {n: b for n, b in base.items() if n in wanted},
        adapter,
        f"the sum of {sources}",
    )


def check_options(method: str, rank: int | None, density: float | None) -> None:
    """What of `combine`'s options can be checked before an adapter is read.

    Raises:
        OptionError: see `combine`.
    """
    if method not in METHODS:
        raise OptionError("method", method, ", ".join(METHODS))
    if rank is not None and rank < 1:
        raise OptionError("rank", rank, "a whole number of at least 1")
    if density is not None and method not in _THINNING:
        raise OptionError("density", density, f"none with {method}; {listed(_THINNING)} take one")
    if density is not None and not 0 < density <= 1:
        raise OptionError("density", density, "a share above 0 and at most 1")


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise OptionError("weights", list(weights), f"one for each of {len(adapters)} adapters")
    for weight in weights:
        if not math.isfinite(weight):
            raise OptionError("weights", list(weights), "finite numbers")


def _targets(adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    """Target key → which adapters have it enabled, on one and the same base, without overlaps."""
    found: dict[str, list[int]] = {}
    on_weight: dict[str, dict[str, int]] = {}
    for i, adapter in enumerate(adapters):
        for key, t in adapter.targets.items():
            name = t.target.name
            mine = adapter.base.get(name)
            for j in range(i):
                other = adapters[j].base.get(name)
                if mine is not None and other is not None:
                    _same_base(adapters[j], adapter, name, other, mine)
            for known, j in on_weight.setdefault(name, {}).items():
                region = adapters[j].targets[known].target.region
                if known != key and region.overlaps(t.target.region):
                    raise OverlapError(known, key)
            on_weight[name].setdefault(key, i)
            if t.enabled:
                found.setdefault(key, []).append(i)
    if not found:
        raise OptionError("adapters", [a.source for a in adapters], "some enabled target")
    return found


def _same_base(a: Adapter, b: Adapter, name: str, mine: BaseWeight, theirs: BaseWeight) -> None:
    if mine.shape != theirs.shape or mine.differs(theirs) == "values":
        what = "values" if mine.shape == theirs.shape else f"{mine.shape} and {theirs.shape}"
        raise MismatchError(
            a.source, b.source, shapes=[f"the base's {name}: {what}"], wanted=len(a.targets)
        )


def _combined(
    key: str,
    pairs: Sequence[tuple[Pair, float]],
    method: str,
    keep: Kept | None,
    density: float,
    seed: int,
) -> tuple[Pair, float | None]:
    """The sum of one target's updates, and the part of it that was lost."""
    from lora_param.weight.lowrank import reduce_product

    if method in ("cat", "svd"):
        pair, error = _joined(pairs), cast("float | None", 0.0)
    elif method == "core-space":
        pair, error = _in_core_space(pairs, density), None
    else:
        pair, error = _added(key, pairs, method, density, seed), None
    if keep is None:
        return pair, error
    low = reduce_product(pair.A, pair.B, keep)
    if error is not None:
        error = math.sqrt(max(0.0, 1 - low.energy))
    return Pair(low.A, low.B, pair.scale), error


def _joined(pairs: Sequence[tuple[Pair, float]]) -> Pair:
    """Σ w·B A as one pair, of all ranks together."""
    import torch

    A = torch.cat([p.A for p, _ in pairs], -2)  # (*, Σ r, in)
    B = torch.cat([p.B * (p.scale * w) for p, w in pairs], -1)  # (*, out, Σ r)
    return Pair(A, B, 1.0)


def _added(
    key: str, pairs: Sequence[tuple[Pair, float]], method: str, density: float, seed: int
) -> Pair:
    """(Σ √w·A, Σ √w·B), each factor thinned first; w is the scale's and the weight's product, whose
    sign goes to A alone."""
    import torch

    ranks = {p.A.shape[-2] for p, _ in pairs}
    if len(ranks) > 1:
        raise OptionError(f"method for {key}", method, f"cat or svd: its ranks are {sorted(ranks)}")
    generator = torch.Generator().manual_seed(seed)
    roots = [math.sqrt(abs(w * p.scale)) for p, w in pairs]
    signed = [math.copysign(root, w * p.scale) for root, (p, w) in zip(roots, pairs, strict=True)]
    sums: list[Tensor] = []
    for factors, weights in (([p.A for p, _ in pairs], signed), ([p.B for p, _ in pairs], roots)):
        if method == "ties":
            sums.append(_ties(factors, weights, density))
        elif method == "dare":
            sums.append(_sum([_dare(f, density, generator) for f in factors], weights))
        else:
            sums.append(_sum(factors, weights))
    return Pair(sums[0], sums[1], 1.0)


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    import torch

    return torch.stack([t * w for t, w in zip(tensors, weights, strict=True)]).sum(0)


def _ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim each to its largest elements, elect a sign, and take the mean of those that have it."""
    import torch

    trimmed = torch.stack([_largest(t, density) for t in tensors])  # (k, *)
    sign = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == sign  # (k, *)
    weighted = torch.stack([t * w for t, w in zip(trimmed, weights, strict=True)])
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(t: Tensor, density: float) -> Tensor:
    """The tensor with only a share of its elements, those of the greatest magnitude."""
    import torch

    count = int(density * t.numel())
    if count == t.numel():
        return t
    kept = torch.zeros(t.numel(), dtype=t.dtype)
    kept[torch.topk(t.abs().flatten(), count).indices] = 1
    return t * kept.view(t.shape)


def _dare(t: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The tensor with a random share of its elements, scaled up for those that are gone."""
    import torch

    keep = torch.rand(t.shape, generator=generator) < density
    return t * keep / density


def _in_core_space(pairs: Sequence[tuple[Pair, float]], density: float) -> Pair:
    """Ties on U_Bᵀ (B A) V_A, with U_B and V_A bases of what all B and all Aᵀ span."""
    import torch

    from lora_param.weight.lowrank import orthonormal

    U = orthonormal(torch.cat([p.B for p, _ in pairs], -1))  # (*, out, k)
    V = orthonormal(torch.cat([p.A for p, _ in pairs], -2).mT)  # (*, in, l)
    cores = [(U.mT @ p.B) @ (p.A @ V) * p.scale for p, _ in pairs]  # (*, k, l) each
    return Pair(V.mT, U @ _ties(cores, [w for _, w in pairs], density), 1.0)
