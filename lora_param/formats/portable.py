"""The adapter that every server takes: a PEFT directory of plain factors.

One rank and one alpha for all, both whole numbers, no patterns, no rsLoRA, no DoRA, no copies, no
biases; A and B of linear layers alone; `target_modules` lists leaf names. Servers differ in what
they read beyond that, and most do not say what they pass over.

Ranks that differ are filled up with zeros, and scales that differ are folded into B: ΔW stays what
it is. What is read again is PEFT.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, Layer
from lora_param.errors import NoFormError, UnsettledError, worded
from lora_param.formats.base import Format
from lora_param.formats.peft.encode import Pair, pair_of
from lora_param.formats.peft.kinds import kinds_of
from lora_param.formats.peft.read import read_peft
from lora_param.formats.peft.write import write_peft
from lora_param.targets.regions import Target
from lora_param.targets.settings import FROM_WEIGHT, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "SERVED_RANKS", "portable"]

SERVED: tuple[Layer, ...] = ("linear", "conv1d")
"""The kinds of layer that servers have factors for."""

SERVED_RANK = 16
"""The highest rank that servers take unless they are told (vLLM's max_lora_rank)."""

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told."""


def portable(adapter: Adapter) -> Adapter:
    """The same update as one pair of factors for each linear layer, of one rank and scale.

    Raises:
        NoFormError: a target that servers have no form for; the message names it.
        UnsettledError: only the base tells what kind of layer a target is of.
    """
    adapter = _settled(adapter)
    for key, t in adapter.targets.items():
        why = _no_form(adapter, t)
        if why:
            raise NoFormError(adapter.source, key, why, _instead())
    kinds = kinds_of(adapter)
    of_weight: dict[str, list[str]] = {}
    for key, t in adapter.targets.items():
        if kinds[t.target.name] not in SERVED:
            why = f"of a layer of kind {kinds[t.target.name]}, and servers take linear layers alone"
            raise NoFormError(adapter.source, key, why, _instead())
        of_weight.setdefault(t.target.name, []).append(key)
    pairs = {name: pair_of(adapter, keys, kinds[name]) for name, keys in of_weight.items()}
    rank = max(p.rank for p in pairs.values())
    scales = {p.scale for p in pairs.values()}
    alpha = scales.pop() * rank if len(scales) == 1 else 0.0
    folded = not (alpha > 0 and alpha.is_integer())
    settings = Settings(rank=rank, alpha=float(rank) if folded else alpha)
    targets: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        target = AdapterTarget(Target(name), settings, layer=kinds[name])
        targets[name] = target
        A, B = _filled(pair, rank, fold=folded)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    return replace(adapter, targets=targets, tensors=tensors)


def _settled(adapter: Adapter) -> Adapter:
    """A PEFT adapter of linear layers goes through without its base: the layout stays PEFT's."""
    if adapter.settle is None:
        return adapter
    open_ = [
        key
        for key, t in adapter.targets.items()
        if adapter.format != "peft"
        or t.layer not in ("linear", "")
        or t.settings.init in FROM_WEIGHT
    ]
    if open_:
        raise UnsettledError(
            adapter.source,
            open_,
            "what its base is like there",
        )
    return replace(adapter, settle=None)


def _instead() -> str:
    lossy = worded("lossy=True", "--lossy")
    return f"give {lossy} to leave it out or to approximate it, or bake it (lora-param bake)"


def _no_form(adapter: Adapter, t: AdapterTarget) -> str:
    """Why servers have no form for a target, or ""."""
    if t.settings.variant == "copy":
        return "a full copy, which servers refuse or pass over"
    if t.settings.variant not in ("lora", "miss"):
        return f"of variant {t.settings.variant}, and servers take plain A and B alone"
    if len(adapter.base[t.target.name].shape) < 2:
        return "an update of a bias, which servers refuse or pass over"
    if not t.target.name.endswith(".weight"):
        return "a parameter that is no layer's weight, and servers take linear layers alone"
    return ""


def _filled(pair: Pair, rank: int, *, fold: bool) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), zero beyond the pair's own rank."""
    import torch

    A, B = pair.A, pair.B
    if fold:
        exact = abs(math.frexp(pair.scale)[0]) == 0.5  # a power of two changes no digit
        B = (B if exact else B.to(torch.promote_types(B.dtype, torch.float32))) * pair.scale
    more = rank - pair.rank
    if more:
        A = torch.cat([A, A.new_zeros(more, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], more)], 1)
    return A.contiguous(), B.contiguous()


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    write_peft(portable(adapter), path, force=force, sync=sync, leaves=True)


def _unsaid(adapter: Adapter) -> str:
    """What a server has to be told, where the rank is above what it takes by itself."""
    ranks: dict[str, int] = {}
    for t in adapter.targets.values():
        name = t.target.name
        ranks[name] = ranks.get(name, 0) + t.settings.rank
    rank = max(ranks.values(), default=0)
    if rank <= SERVED_RANK:
        return ""
    takes = next((r for r in SERVED_RANKS if r >= rank), rank)
    return (
        f"It is of rank {rank}, and servers take {SERVED_RANK} at most by default: tell them "
        f"(vLLM: --max-lora-rank {takes}), or resize it first (lora-param resize -r {SERVED_RANK})."
    )


FORMAT = Format("portable", lambda _: False, read_peft, _write, SERVED, unsaid=_unsaid)
"""No path is recognised as this format: what was written is PEFT's, and is read so."""
