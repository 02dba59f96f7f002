"""Targets as PEFT's tensors: one pair for each weight, in PEFT's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, Layer
from lora_param.errors import NoFormError, worded
from lora_param.targets.settings import INITIAL, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pair", "check_whole", "encode_pair", "is_lora", "pair_of", "scaled_to"]

_BAKE = "bake it (lora-param bake), or leave it out"
_OTHERS = ("loha", "lokr", "diff", "oft", "boft", "oft_columns", "copy")


def is_lora(settings: Settings) -> bool:
    """The update is scale·(B @ A) of its own rank, or DoRA of it."""
    lengths = settings.parsed_form.words & {"rows", "columns"}
    return settings.variant not in _OTHERS and not lengths


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


def pair_of(
    adapter: Adapter,
    keys: Sequence[str],
    kind: Layer,
    tool: str = "PEFT",
    *,
    any_side: bool = False,
) -> Pair:
    """All updates of one weight as one pair.

    Args:
        adapter: of which.
        keys: its targets on the weight.
        kind: of layer.
        tool: whose form it is for, for messages.
        any_side: DoRA's lengths may be of the columns or of the rows of W.

    Raises:
        NoFormError: the tool has none for them.
    """
    targets = [adapter.targets[k] for k in keys]
    for key, t in zip(keys, targets, strict=True):
        _check(adapter, key, t, kind, tool, alone=len(keys) == 1, any_side=any_side)
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
                adapter.source,
                str(t.target),
                f"columns of a convolution, which {tool} has not",
                _BAKE,
            )
        own = scaled_to(p, scale)
        A, B = p.A.new_zeros(p.rank, columns), own.new_zeros(rows, p.rank)
        A[:, slice(*region.columns) if region.columns else slice(None)] = p.A
        B[slice(*region.rows) if region.rows else slice(None)] = own
        As.append(A)
        Bs.append(B)
    return Pair(torch.cat(As), torch.cat(Bs, 1), scale)


def scaled_to(pair: Pair, scale: float) -> Tensor:
    """B so that scale·(B @ A) is the pair's update; itself where the scale is the pair's."""
    import torch

    if pair.scale == scale:
        return pair.B
    wide = torch.promote_types(pair.B.dtype, torch.float32)
    return pair.B.to(wide) * (pair.scale / scale)


def _check(
    adapter: Adapter,
    key: str,
    t: AdapterTarget,
    kind: Layer,
    tool: str,
    *,
    alone: bool,
    any_side: bool,
) -> None:
    def no(why: str, instead: str = _BAKE) -> NoFormError:
        return NoFormError(adapter.source, key, why, instead)

    variant, region = t.settings.variant, t.target.region
    _check_state(adapter, key, t, tool)
    if not is_lora(t.settings):
        raise no(
            f"of variant {variant}, and {tool} has LoRA alone there",
            f"give {worded('lossy=True', '--lossy')} to approximate it "
            f"({worded('rank=', '--rank N')}), or bake it (lora-param bake)",
        )
    of_columns = kind in ("conv1d", "embedding")
    if variant in ("dora", "dora_columns"):
        if kind in ("attention", "parameter", "in_first"):
            raise no(f"DoRA, which {tool} does not have there")
        if (variant == "dora_columns") != of_columns and not any_side:
            raise no(f"DoRA over the other side of the weight than {tool}'s")
        if t.strength != 1:
            raise no(f"DoRA at strength {t.strength:g}, which {tool} does not have")
        if not region.is_whole or not alone:
            raise no(f"DoRA of a part of a weight, which {tool} does not have")
    dims = len(adapter.base[t.target.name].shape)
    if region.stacked and kind not in ("parameter", "in_first"):
        raise no(f"a stack in a layer of kind {kind}, which {tool} does not have")
    if dims > 2 and not region.stacked and kind != "conv":
        raise no(f"a stack as one matrix, which {tool} does not have")
    if dims > 3 and kind != "conv":
        raise no(f"of {dims} dimensions, and {tool} takes parameters of 2 and 3")


def _check_state(adapter: Adapter, key: str, t: AdapterTarget, tool: str) -> None:
    if not t.enabled:
        why = f"disabled, and {tool} has no such switch"
        raise NoFormError(adapter.source, key, why, "enable it, or take it out first")
    if t.also:
        why = f"shared with {t.also[0]}, and {tool} adapts one name of a tie"
        raise NoFormError(adapter.source, key, why, "apply it apart")


def check_whole(adapter: Adapter, keys: Sequence[str], tool: str) -> AdapterTarget:
    """The one target of a weight, of a variant that a tool has for whole weights alone.

    Raises:
        NoFormError: it is a part, one of several, disabled, or at another strength than it has.
    """
    key, t = keys[0], adapter.targets[keys[0]]
    _check_state(adapter, key, t, tool)
    if len(keys) > 1 or not t.target.region.is_whole:
        raise NoFormError(
            adapter.source,
            key,
            f"a part of a weight, of which {tool} has {t.settings.variant} as a whole",
            _BAKE,
        )
    turned = t.settings.variant in ("oft", "boft", "oft_columns")
    if t.strength != 1 and (turned or t.settings.parsed_form.words & {"rows", "columns"}):
        raise NoFormError(
            adapter.source, key, f"at strength {t.strength:g}, which {tool} does not have", _BAKE
        )
    return t


def _plain(adapter: Adapter, key: str, t: AdapterTarget) -> Pair:
    """One target as a pair: an initial pair folded in, MiSS's constant written out.

    Tucker's core goes into A, in fp32 at least.
    """
    import torch

    from lora_param.weight.precision import compute_dtype
    from lora_param.weight.update import fold_initial
    from lora_param.weight.variants import variant_of

    tensors = {n: v.detach().cpu() for n, v in adapter.factors(key).items()}
    scale = t.scale * t.strength
    if "lora_A" not in tensors:
        variant = variant_of(t.settings)
        if t.settings.variant == "tucker":
            wide = {n: v.to(compute_dtype(v.dtype)) for n, v in tensors.items()}
            pair = variant.pair(wide, 1.0, 1.0)
            assert pair is not None
            return Pair(pair[0], tensors["lora_up"], scale)
        W = torch.empty(t.target.region.matrix(adapter.base[t.target.name].shape), device="meta")
        form = variant.lower(W, tensors, 1.0, 1.0)  # of its shape alone
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
