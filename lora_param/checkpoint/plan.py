"""Which entries of a checkpoint adapters change: checked before anything is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.fit import check_checkpoint
from lora_param.checkpoint.measures import is_finite
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.pieces import Piece
from lora_param.errors import NonFiniteError, OptionError
from lora_param.files.safetensors import tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["plan_merging"]


def plan_merging(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: torch.dtype | None,
    check_fingerprint: bool,
) -> Merging:
    """Check that the adapters fit the base and list what is to be merged; writes nothing.

    Raises:
        MismatchError, FingerprintError: an adapter does not fit.
        NonFiniteError: an enabled factor holds NaN or infinity.
        OptionError: a weight that is not finite.
    """
    pieces: dict[str, list[Piece]] = {}
    disabled: list[str] = []
    settled: list[Adapter] = []
    digest = hashlib.sha256()
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise OptionError(f"the weight of {adapter.source}", weight, "a finite number")
        adapter = check_checkpoint(adapter, base, check_fingerprint=check_fingerprint)
        settled.append(adapter)
        for key, t in adapter.targets.items():
            if not t.enabled:
                disabled.append(key)
                continue
            piece = Piece(adapter, key, weight)
            factors = piece.factors()
            _check_finite(piece, factors)
            digest.update(repr((len(settled), weight, key, t, sorted(factors))).encode())
            for _, tensor in sorted(factors.items()):
                digest.update(tensor_bytes(tensor))
            for name in _entries_of(t, base):
                pieces.setdefault(name, []).append(piece)
    mark = digest.hexdigest()
    return Merging(base, pieces, dtype, disabled, settled, adapters_mark=mark)


def _entries_of(t: AdapterTarget, base: Checkpoint) -> list[str]:
    """The entries that take a target's update: its names, and what the file ties to them."""
    own = [n for n in (t.target.name, *t.also) if n in base]
    tied = [other for n in own for other in base.weights[n].tied]
    return [n for n in dict.fromkeys([*own, *tied]) if n not in t.apart]


def _check_finite(piece: Piece, factors: Mapping[str, Tensor]) -> None:
    import torch

    for name, tensor in factors.items():
        if not is_finite(tensor.to(torch.promote_types(tensor.dtype, torch.float32))):
            raise NonFiniteError(f"{name} of {piece.key} in {piece.adapter.source}")
    t = piece.target
    if not math.isfinite(t.scale * t.strength * piece.weight):
        raise NonFiniteError(f"the scale of {piece.key} in {piece.adapter.source}")
