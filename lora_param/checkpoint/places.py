"""Where a bake's result goes: checked before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from lora_param.adapter import Adapter
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.options import BakeOptions, PathText
from lora_param.checkpoint.pickle import SUFFIXES
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, find_weights
from lora_param.errors import FileError, OptionError, OutputError, worded
from lora_param.files.locks import State, locked
from lora_param.files.places import writable
from lora_param.files.writer import check_output

__all__ = ["check_place", "has_shards", "held", "is_directory", "place_of", "stored_in"]


def stored_in(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is stored, where it is shown as another."""
    return checkpoint.stored if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint


def held(base: PathText) -> AbstractContextManager[State | None]:
    """The lock of what is read and replaced in place: a second bake of it waits for the first."""
    path = writable(base)
    return locked(path.parent if path.name.endswith(".index.json") else path)


def place_of(checkpoint: Checkpoint, base: PathText, out: PathText | None, in_place: bool) -> Path:
    """Where the result goes: the output asked for, or the base itself."""
    if isinstance(checkpoint.path, str):
        if out is None or in_place:
            raise OutputError(base, "a model that a call builds needs an output file of its own")
        return writable(out)
    own = checkpoint.path
    if out is None:
        if not in_place:
            raise OptionError("out", None, f"a path, or {worded('in_place=True', '--in-place')}")
        return own
    same = os.path.realpath(out) in (os.path.realpath(own), os.path.realpath(base))
    if same and not in_place:
        instead = worded("in_place=True", "--in-place")
        raise OutputError(out, f"it is the input; give another path, or {instead}")
    if in_place and not same:
        raise OptionError(
            "out", str(out), f"nothing but the input, with {worded('in_place=True', '--in-place')}"
        )
    return own if in_place else writable(out)


def check_place(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    place: Path,
    options: BakeOptions,
) -> None:
    """Refuse a place that must not be written, or that is of another kind than the base."""
    in_place, directory = options.in_place, is_directory(checkpoint)
    real = check_output(place, force=options.force or in_place, directory=directory)
    for adapter, _ in adapters:
        source = Path(os.path.realpath(adapter.source))  # of one in memory, no path at all
        gone = source == real or (directory and not in_place and real in source.parents)
        if gone and source.exists():
            raise OutputError(place, f"the adapter {adapter.source} is there")
    suffix = place.suffix.lower()
    if directory:
        own = Path(os.path.realpath(checkpoint.path))
        if not in_place and (own in real.parents or real in own.parents):
            raise OutputError(place, f"one of it and the input {checkpoint.path} is in the other")
        if not in_place and suffix in (".safetensors", *SUFFIXES):
            raise OutputError(
                place, f"the input is a directory, and so the output; its name ends in {suffix}"
            )
        if real.is_dir():
            _check_replaceable(real)
    elif isinstance(checkpoint.path, str):
        if suffix != ".safetensors" and suffix not in SUFFIXES:
            raise OutputError(
                place, "its name ends in none of .safetensors, .pt, .pth, .bin, .ckpt"
            )
    elif isinstance(checkpoint, GgufCheckpoint):
        if suffix != ".gguf":
            raise OutputError(
                place, "the input is a GGUF file, and so is the output: name it .gguf"
            )
    elif isinstance(checkpoint, SafetensorsCheckpoint) and suffix in SUFFIXES:
        raise OutputError(place, "the input is a .safetensors file, and so the output: name it so")
    elif not isinstance(checkpoint, SafetensorsCheckpoint) and suffix == ".safetensors":
        raise OutputError(place, "the input is from torch.save, and so the output: name it .pt")


def is_directory(checkpoint: Checkpoint) -> bool:
    """It is a directory, and so is what a bake makes of it."""
    return isinstance(checkpoint, DirectoryCheckpoint | DistributedCheckpoint)


def has_shards(checkpoint: Checkpoint) -> bool:
    """It is a directory of safetensors."""
    return isinstance(checkpoint, DirectoryCheckpoint) and all(
        isinstance(part, SafetensorsCheckpoint) for part in checkpoint.parts.values()
    )


def _check_replaceable(directory: Path) -> None:
    """A directory is replaced whole: refuse one that holds no checkpoint, or where we stand."""
    here = Path(os.path.realpath(Path.cwd()))
    if directory == here or directory in here.parents:
        raise OutputError(directory, "the current directory is in it, and it would be replaced")
    if not any(directory.iterdir()):
        return
    try:
        find_weights(directory)
    except FileError:
        raise OutputError(
            directory, "it is a directory that holds no checkpoint, and all in it would be lost"
        ) from None
