"""How to bake: the settings of a bake, and what is read from text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from lora_param.checkpoint.unpacking import Form
from lora_param.errors import OptionError, worded

if TYPE_CHECKING:
    import torch

__all__ = ["BakeOptions", "PathText", "parse_dtype", "parse_size"]

PathText = str | os.PathLike[str]
Report = Callable[[int, int, str], None]

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float64": "float64",
    "fp64": "float64",
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_UNITS = {
    f"{p}{i}{b}": (1024 if i else 1000) ** n
    for n, p in enumerate(("", "K", "M", "G", "T"))
    for i in ("", "I")
    for b in ("", "B")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeOptions:
    """How to bake.

    Attributes:
        dtype: store floating tensors in this dtype; by default in their own.
        key: dotted name of the nested state dict in a pickle.
        check_fingerprint: refuse a base with other values than the adapter was made on.
        in_place: replace the base.
        force: replace an output that exists.
        sync: have the data on the disk before the name shows them.
        verify: read the result again and compare each tensor, before it takes its place.
        require_change: refuse to write a result in which no element is changed although targets
            are enabled: their updates are zero, or too small for the stored dtype.
        progress: called with bytes done, bytes in all, and the name of what was done.
        max_shard_size: divide the weights of a directory of safetensors anew, into files of at
            most so many bytes (or e.g. "5GB"); a weight that is larger has a file of its own.
        link: whole files of weights that nothing changes become hard links to the base's, where
            the file system has them: writing into one of the two then changes both.
        quantized: what becomes of quantized weights: "dense", all of them plain ones of the
            model's dtype (or `dtype`), or "same", quantized again by their format. By default
            dense.
        original: the checkpoint that a quantized base was made of, to measure how far it is.
        resume: go on with a bake of the same base, adapters and settings that was killed.

    Raises:
        OptionError: a value outside what is accepted.
    """

    dtype: torch.dtype | str | None = None
    key: str | None = None
    check_fingerprint: bool = True
    in_place: bool = False
    force: bool = False
    sync: bool = True
    verify: bool = False
    require_change: bool = False
    progress: Report | None = None
    max_shard_size: int | str | None = None
    link: bool = False
    quantized: Form | None = None
    original: PathText | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        if self.max_shard_size is not None:
            parse_size(self.max_shard_size)
        if self.quantized not in (None, *get_args(Form)):
            option = worded("quantized", "--as")
            raise OptionError(option, self.quantized, ", ".join(get_args(Form)))


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from torch's or a short name of it.

    Raises:
        OptionError: it is none that a whole checkpoint can be stored in.
    """
    if dtype is None:
        return None
    import torch

    name = _DTYPES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise OptionError("dtype", str(dtype), ", ".join(_DTYPES))
    parsed: torch.dtype = getattr(torch, name)
    return parsed


def parse_size(size: int | str) -> int:
    """A number of bytes, as a number or with a unit.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(7)
    (5000000000, 1572864, 7)

    Raises:
        OptionError: it is none, or not positive.
    """
    match = _SIZE.fullmatch(str(size).strip())
    factor = _UNITS[match[2].upper()] if match else 0
    found = int(float(match[1]) * factor) if match else 0
    if found < 1:
        raise OptionError("max_shard_size", size, "a number of bytes, or e.g. 500MB, 5GB, 2GiB")
    return found
