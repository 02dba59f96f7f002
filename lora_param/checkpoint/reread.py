"""Reading a baked checkpoint again, before it takes its place."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.quantized.logical import SIDE_CONFIGS, QuantizedCheckpoint
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.checkpoint.unpacking import Form, requantized
from lora_param.errors import OutputError
from lora_param.files.places import fetched, files_below
from lora_param.files.safetensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["verify_directory", "verify_distributed", "verify_file", "verify_quantized"]


def verify_file(
    merging: Merging,
    part: Checkpoint,
    written: Path,
    tick: Callable[[int, str], None],
    place: Path,
) -> None:
    """Read a file again and compare each tensor with what was meant, bit for bit.

    Args:
        merging: what was meant.
        part: the file of the base.
        written: the file to read, under its temporary name.
        tick: called with bytes done and a name.
        place: what the file will be called.

    Raises:
        OutputError: something differs.
    """
    is_safetensors = isinstance(part, SafetensorsCheckpoint) or (
        isinstance(part.path, str) and place.suffix.lower() == ".safetensors"
    )
    again: Checkpoint = (
        SafetensorsCheckpoint(written) if is_safetensors else PickleCheckpoint(written, part.key)
    )
    with again:
        _compare(merging, part, again, tick, place)


def _compare(
    merging: Merging,
    base: Checkpoint,
    again: Checkpoint,
    tick: Callable[[int, str], None],
    place: Path,
) -> None:
    if set(again) != set(base):
        raise OutputError(place, "read again, it holds other names than the input")
    for name in base:
        meant, found = merging.stored(name, base[name]), again[name]
        if not _same_bits(meant, found):
            raise OutputError(place, f"read again, {name} is not what was written")
        tick(meant.numel() * meant.element_size(), name)


def _same_bits(meant: Tensor, found: Tensor) -> bool:
    if meant.is_nested and found.is_nested:
        parts = meant.unbind(), found.unbind()
        return len(parts[0]) == len(parts[1]) and all(map(_same_bits, *parts))
    if meant.dtype != found.dtype or meant.shape != found.shape or meant.layout != found.layout:
        return False
    import torch

    if meant.layout == torch.sparse_coo:
        a, b = meant.coalesce(), found.coalesce()
        pairs = [(a.indices(), b.indices()), (a.values(), b.values())]
        return all(_same_bits(x, y) for x, y in pairs)
    if meant.layout != torch.strided:
        return _same_bits(meant.to_sparse(), found.to_sparse())  # from a compressed layout
    if meant.is_quantized:
        same_steps = meant.qscheme() == found.qscheme() and torch.equal(
            meant.dequantize(), found.dequantize()
        )
        return same_steps and _same_bits(meant.int_repr(), found.int_repr())
    return tensor_bytes(meant) == tensor_bytes(found)


def verify_directory(
    merging: Merging,
    base: DirectoryCheckpoint,
    written: Path,
    tick: Callable[[int, str], None],
) -> None:
    """`verify_file` for each file of weights; all other files are compared with the base's.

    Raises:
        OutputError: something differs.
    """
    rewritten, index = {*base.parts}, {base.index.name} if base.index else set()
    if merging.max_shard_size is None:
        for name, part in base.parts.items():
            verify_file(merging, part, written / name, tick, Path(name))
    else:
        rewritten |= index
        with DirectoryCheckpoint(written) as again:
            _compare(merging, base, again, tick, written)
    if merging.dtype:
        rewritten |= {"config.json", *index}
    _compare_others(base, written, rewritten)


def verify_distributed(
    merging: Merging,
    base: DistributedCheckpoint,
    written: Path,
    tick: Callable[[int, str], None],
) -> None:
    """Read a distributed checkpoint again: every tensor of the state dict, and all other files.

    Raises:
        OutputError: something differs.
    """
    with DistributedCheckpoint(written, base.key) as again:
        _compare(merging, base, again, tick, written)
    _compare_others(base, written, set(base.index.files))


def _compare_others(
    base: DirectoryCheckpoint | DistributedCheckpoint, written: Path, rewritten: set[str]
) -> None:
    for path in files_below(base.path):
        name = path.relative_to(base.path).as_posix()
        if name not in rewritten:
            copy = written / name
            if not copy.is_file() or not filecmp.cmp(fetched(path), copy, shallow=False):
                raise OutputError(name, "read again, it is not the input's")


def verify_quantized(
    merging: Merging,
    base: QuantizedCheckpoint,
    form: Form,
    written: Path,
    tick: Callable[[int, str], None],
) -> None:
    """Read the result of a quantized base again, a file or a directory, and compare every tensor.

    Raises:
        OutputError: something differs.
    """
    stored = base.stored
    with _opened_like(stored, written) as again:
        if form == "dense":
            _compare(merging, base, again, tick, written)
        else:
            _compare_packed(merging, base, again, tick, written)
    if isinstance(stored, DirectoryCheckpoint):
        index = {stored.index.name} if stored.index else set()
        dense = {"config.json", *SIDE_CONFIGS, *index} if form == "dense" else set()
        _compare_others(stored, written, {*stored.parts, *dense})


def _opened_like(stored: Checkpoint, written: Path) -> Checkpoint:
    if isinstance(stored, DirectoryCheckpoint):
        return DirectoryCheckpoint(written)
    gguf = isinstance(stored, GgufCheckpoint)
    return GgufCheckpoint(written) if gguf else SafetensorsCheckpoint(written)


def _compare_packed(
    merging: Merging,
    base: QuantizedCheckpoint,
    again: Checkpoint,
    tick: Callable[[int, str], None],
    place: Path,
) -> None:
    computed = {n: w.name for w in base.packed.values() for n in w.entries.values()}
    if set(again) != set(base.stored):
        raise OutputError(place, "read again, it holds other names than the input")
    done: tuple[str, dict[str, Tensor]] = "", {}
    for name in base.stored:
        owner, found = computed.get(name, ""), again[name]
        if owner in merging.pieces:
            if done[0] != owner:
                done = owner, requantized(merging, base, owner)
            meant = done[1][name]
        else:
            meant = base.stored[name]
            meant = meant if owner else merging.stored(name, meant)
        if not _same_bits(meant, found):
            raise OutputError(place, f"read again, {name} is not what was written")
        tick(meant.numel() * meant.element_size(), name)
