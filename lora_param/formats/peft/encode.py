"""Targets as PEFT's tensors: one pair for each weight, in PEFT's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, Layer
from lora_param.errors import NoFormError
from lora_param.targets.settings import INITIAL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pair", "encode_pair", "pair_of"]

_BAKE = "bake it (lora-param bake), or leave it out"


@dataclass
class Pair:
    """scale·(B @ A) over a whole weight, in the layout of W, and DoRA's lengths.

    Attributes:
        A: (rank, in), for a stack (E, rank, in).
        B: (out, rank), for a stack (E, out, rank).
        scale: what multiplies B @ A.
        alpha: of rank and alpha as PEFT reads them, where the settings say it exactly.
        rslora: alpha is over √rank.
        magnitude: DoRA's, or None.
    """

    A: Tensor
    B: Tensor
    scale: float
    alpha: float | None = None
    rslora: bool = False
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[-2])


def pair_of(adapter: Adapter, keys: Sequence[str], kind: Layer) -> Pair:
    """All updates of one weight as one pair.

    Raises:
        NoFormError: PEFT has none for them.
    """
    targets = [adapter.targets[k] for k in keys]
    for key, t in zip(keys, targets, strict=True):
        _check(adapter, key, t, kind, alone=len(keys) == 1)
    pairs = [_plain(adapter, k, t) for k, t in zip(keys, targets, strict=True)]
    if len(pairs) == 1 and (targets[0].target.region.is_whole or targets[0].target.region.stacked):
        return pairs[0]
    import torch

    shape = adapter.base[targets[0].target.name].shape
    rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
    scale = next((p.scale for p in pairs if p.scale), 1.0)
    As, Bs = [], []
    for p, t in zip(pairs, targets, strict=True):
        region = t.target.region
        if region.columns is not None and len(shape) != 2:
            raise NoFormError(
                adapter.source, str(t.target), "columns of a convolution, which PEFT has not", _BAKE
            )
        A, B = p.A.new_zeros(p.rank, columns), p.B.new_zeros(rows, p.rank)
        A[:, slice(*region.columns) if region.columns else slice(None)] = p.A
        B[slice(*region.rows) if region.rows else slice(None)] = p.B * (p.scale / scale)
        As.append(A)
        Bs.append(B)
    return Pair(torch.cat(As), torch.cat(Bs, 1), scale)


def _check(adapter: Adapter, key: str, t: AdapterTarget, kind: Layer, *, alone: bool) -> None:
    def no(why: str, instead: str = _BAKE) -> NoFormError:
        return NoFormError(adapter.source, key, why, instead)

    variant, region = t.settings.variant, t.target.region
    if not t.enabled:
        raise no("disabled, and PEFT has no such switch", "enable it, or take it out first")
    if t.also:
        raise no(f"shared with {t.also[0]}, and PEFT adapts one name of a tie", "apply it apart")
    of_columns = kind in ("conv1d", "embedding")
    if variant in ("dora", "dora_columns"):
        if kind in ("attention", "parameter", "in_first"):
            raise no("DoRA, which PEFT does not have there")
        if (variant == "dora_columns") != of_columns:
            raise no("DoRA over the other side of the weight than PEFT's")
        if t.strength != 1:
            raise no(f"DoRA at strength {t.strength:g}, which PEFT does not have")
        if not region.is_whole or not alone:
            raise no("DoRA of a part of a weight, which PEFT does not have")
    dims = len(adapter.base[t.target.name].shape)
    if region.stacked and kind not in ("parameter", "in_first"):
        raise no(f"a stack in a layer of kind {kind}, which PEFT does not have")
    if dims > 2 and not region.stacked and kind != "conv":
        raise no("a stack as one matrix, which PEFT does not have")
    if dims > 3 and kind != "conv":
        raise no(f"of {dims} dimensions, and PEFT takes parameters of 2 and 3")


def _plain(adapter: Adapter, key: str, t: AdapterTarget) -> Pair:
    """One target as a pair: an initial pair folded in, MiSS's constant written out."""
    import torch

    from lora_param.weight.update import fold_initial
    from lora_param.weight.variants import variant_named

    tensors = {n: v.detach().cpu() for n, v in adapter.factors(key).items()}
    scale = t.scale * t.strength
    if "lora_A" not in tensors:
        W = torch.empty(t.target.region.matrix(adapter.base[t.target.name].shape), device="meta")
        form = variant_named(t.settings.variant).lower(W, tensors, 1.0, 1.0)
        assert form is not None
        return Pair(form.A, form.B, scale)
    folded = any(n in tensors for n in INITIAL)
    tensors = dict(fold_initial(tensors))
    settings = t.settings
    said = not folded and settings.scaling != "constant"
    return Pair(
        tensors["lora_A"],
        tensors["lora_B"],
        scale,
        settings.alpha * t.strength if said else None,
        said and settings.scaling == "rslora",
        tensors.get("magnitude"),
    )


def encode_pair(pair: Pair, kind: Layer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A and B in PEFT's layout, for a weight of this shape."""
    A, B = pair.A, pair.B
    if kind in ("conv1d", "embedding", "in_first"):
        A, B = B.mT, A.mT
    if kind == "conv":
        rank, ones = pair.rank, (1,) * (len(shape) - 2)
        return A.reshape(rank, *shape[1:]), B.reshape(shape[0], rank, *ones)
    if A.dim() == 3:  # experts outside in A's rows, inside in B's columns
        A = A.reshape(-1, A.shape[-1])  # (E·r, in)
        B = B.permute(1, 2, 0).reshape(B.shape[1], -1)  # (out, r·E)
    return A.contiguous(), B.contiguous()
