"""`bake_checkpoint`: baking adapters that are given as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter
from lora_param.checkpoint.bake import BakeReport, bake_adapters
from lora_param.formats import read_adapter

if TYPE_CHECKING:
    import torch

__all__ = ["Adapters", "bake_checkpoint"]

One = str | os.PathLike[str] | Adapter
Adapters = One | Sequence[One | tuple[One, float]] | Mapping[str, float]


def bake_checkpoint(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    key: str | None = None,
    check_fingerprint: bool = True,
    in_place: bool = False,
    force: bool = False,
    sync: bool = True,
    verify: bool = False,
    require_change: bool = False,
    layout: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> BakeReport:
    """Write W + ΔW where W stood: a checkpoint of the base's names, shapes, shards and other files.

    Args:
        base: a checkpoint of any kind that `open_checkpoint` takes.
        adapters: an adapter or its path; or a list of these, each alone or with what its update
            is multiplied by, as (adapter, weight); or a mapping path → weight.
        out: a file for a file, a directory for a directory; None with `in_place`.
        dtype: store floating tensors in this dtype; by default in their own.
        key: dotted name of the nested state dict in a pickle.
        check_fingerprint: refuse a base with other values than the adapter was made on.
        in_place: replace the base.
        force: replace an output that exists.
        sync: have the data on the disk before the name shows them.
        verify: read the result again and compare each tensor, before it takes its place.
        require_change: refuse to write a result in which no element is changed although targets
            are enabled: their updates are zero, or too small for the stored dtype.
        layout: as for `read_adapter`.
        progress: called with bytes done, bytes in all, and the name of what was done.

    Raises:
        UnchangedError: see `require_change`.
        AdapterError: an adapter does not fit, or holds values that are not finite.
        FileError: something cannot be read, or the output cannot or must not be written.
        OptionError: a setting outside its accepted values.

    >>> bake_checkpoint("model", {"a.safetensors": 0.5}, "baked").changed  # doctest: +SKIP
    1769472
    """
    return bake_adapters(
        base,
        _pairs(adapters, layout),
        out,
        dtype=dtype,
        key=key,
        check_fingerprint=check_fingerprint,
        in_place=in_place,
        force=force,
        sync=sync,
        verify=verify,
        require_change=require_change,
        progress=progress,
    )


def _pairs(adapters: Adapters, layout: str | None) -> list[tuple[Adapter, float]]:
    if isinstance(adapters, str | os.PathLike | Adapter):
        adapters = [adapters]
    items = adapters.items() if isinstance(adapters, Mapping) else adapters
    pairs = (item if isinstance(item, tuple) else (item, 1.0) for item in items)
    return [
        (a if isinstance(a, Adapter) else read_adapter(a, layout=layout), float(w))
        for a, w in pairs
    ]
