"""The verbs over files alone: `apply_checkpoint` creates an adapter, `bake_checkpoint` bakes some.

Beside `api`, which has those that take a live model as well. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lora_param.adapter import Adapter, check_name
from lora_param.checkpoint.bake import bake_adapters
from lora_param.checkpoint.baked import BakeReport
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.options import BakeOptions
from lora_param.checkpoint.unpacking import Form
from lora_param.errors import OutputError
from lora_param.files.writer import check_output
from lora_param.formats import check_adapter_name, read_adapter, write_adapter
from lora_param.targets.options import read_options, takes_settings
from lora_param.targets.plan import Plan, Tied, check_tied
from lora_param.targets.settings import SettingsOptions

if TYPE_CHECKING:
    import torch

__all__ = ["Adapters", "apply_checkpoint", "bake_checkpoint"]

PathLike = str | os.PathLike[str]
Patterns = str | Iterable[str]
One = PathLike | Adapter
Adapters = One | Sequence[One | tuple[One, float]] | Mapping[str, float]


@takes_settings
def apply_checkpoint(
    base: PathLike,
    targets: Patterns,
    out: PathLike,
    *,
    exclude: Patterns = (),
    tied: Tied = "error",
    adapter: str = "default",
    seed: int | None = None,
    key: str | None = None,
    force: bool = False,
    sync: bool = True,
    **options: Unpack[SettingsOptions],
) -> Plan:
    """Create an adapter for weights of a checkpoint, without the model's code, and write it.

    The checkpoint stays as it is; `load` puts the adapter on a model, `bake_checkpoint` on files.

    Args:
        base: a checkpoint's file or directory, or `python:package.module:callable`.
        targets, exclude, tied: as for `apply`.
        out: the adapter file to write.
        adapter: its name.
        seed: makes the factors, and so the file, repeatable.
        key: which nested state dict of a pickled checkpoint.
        force: replace a file that exists.
        sync: have the data on the disk before the name shows them.
        **options: the settings of what the patterns do not set.

    Returns:
        The plan that was carried out.

    Raises:
        TargetError, OptionError, UnknownOptionError: as for `apply`.
        FileError: the checkpoint cannot be read, or the adapter not be written.
    """
    read_options(apply_checkpoint, options)
    check_name(adapter)
    check_tied(tied)
    check_adapter_name(Path(out))
    if Path(out).exists() and Path(base).exists() and Path(out).samefile(base):
        raise OutputError(out, "it is the checkpoint itself")
    check_output(out, force=force)
    done, record = create_adapter(
        base,
        targets,
        exclude=exclude,
        tied=tied,
        seed=seed,
        key=key,
        name=adapter,
        **options,
    )
    write_adapter(record, out, force=force, sync=sync)
    return done


def bake_checkpoint(
    base: PathLike,
    adapters: Adapters,
    out: PathLike | None = None,
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
    alpha: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    max_shard_size: int | str | None = None,
    link: bool = False,
    quantized: Form | None = None,
    original: PathLike | None = None,
    resume: bool = False,
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
        layout, alpha: as for `read_adapter`.
        progress: called with bytes done, bytes in all, and the name of what was done.
        max_shard_size: divide the weights of a directory of safetensors anew, into files of at
            most so many bytes (or e.g. "5GB"); a weight that is larger has a file of its own.
        link: whole files of weights that nothing changes become hard links to the base's, where
            the file system has them: writing into one of the two then changes both.
        quantized: what becomes of quantized weights: "dense" (by default), all of them plain ones
            of the model's dtype, or of `dtype`; or "same", quantized again by their format, which
            is refused where less than half of an update is left, unless `force` is given.
        original: the checkpoint that a quantized base was made of; the report then says how large
            the error of its quantization is against the updates.
        resume: go on with a bake to the same output that was killed, where base, adapters and
            settings are the same: what it had written is kept, and the result is the same to the
            bit. What is left of another bake is not used. The report's notes say which it was.

    Raises:
        UnchangedError: see `require_change`.
        AdapterError: an adapter does not fit, or holds values that are not finite.
        FileError: something cannot be read, or the output cannot or must not be written.
        OptionError: a setting outside its accepted values.

    >>> bake_checkpoint("model", {"a.safetensors": 0.5}, "baked").changed  # doctest: +SKIP
    1769472
    """
    options = BakeOptions(
        dtype=dtype,
        key=key,
        check_fingerprint=check_fingerprint,
        in_place=in_place,
        force=force,
        sync=sync,
        verify=verify,
        require_change=require_change,
        progress=progress,
        max_shard_size=max_shard_size,
        link=link,
        quantized=quantized,
        original=original,
        resume=resume,
    )
    return bake_adapters(base, _pairs(adapters, layout, alpha), out, options)


def _pairs(
    adapters: Adapters, layout: str | None, alpha: float | None
) -> list[tuple[Adapter, float]]:
    if isinstance(adapters, str | os.PathLike | Adapter):
        adapters = [adapters]
    items = adapters.items() if isinstance(adapters, Mapping) else adapters
    pairs = (item if isinstance(item, tuple) else (item, 1.0) for item in items)
    return [
        (a if isinstance(a, Adapter) else read_adapter(a, layout=layout, alpha=alpha), float(w))
        for a, w in pairs
    ]
