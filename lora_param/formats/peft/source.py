"""Finding a PEFT adapter's two files, and what a path seems to be without reading tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.checkpoint.unpickling import load_pickle
from lora_param.errors import BrokenFileError, listed
from lora_param.files.header import read_header
from lora_param.files.places import fetched
from lora_param.files.safetensors import SafetensorsFile
from lora_param.formats.peft.config import PeftConfig, read_config
from lora_param.formats.peft.keys import looks_peft

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONFIG", "WEIGHTS", "Source", "open_source", "recognise"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_BIN = "adapter_model.bin"


@dataclass(frozen=True)
class Source:
    """The two files of an adapter.

    Attributes:
        name: what the adapter is called: "default", or its sub-directory's name.
        path: what was given.
        config: its settings.
        tensors: its tensors, read as they are asked for.
        shapes: their shapes.
    """

    name: str
    path: Path
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


def recognise(path: Path) -> bool:
    """A directory with one of the two files, here or one below, or a file with PEFT's keys."""
    if path.is_dir():
        return _has_any(path) or bool(_below(path))
    if not path.is_file():
        return False
    if path.name in (CONFIG, _BIN):
        return True
    return path.suffix.lower() == ".safetensors" and looks_peft(read_header(path).entries)


def _has_any(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (CONFIG, WEIGHTS, _BIN))


def _below(directory: Path) -> list[Path]:
    """Sub-directories of adapters with names of their own."""
    return [p for p in sorted(directory.iterdir()) if p.is_dir() and (p / CONFIG).is_file()]


def open_source(path: Path) -> Source:
    """Find both files and read the config and the tensors' names.

    Raises:
        BrokenFileError: one of the two is missing, or there are several adapters.
        UnknownFileError, NoFormError: see `read_config`.
    """
    directory, weights, name = path, None, "default"
    if path.is_file():
        directory = path.parent
        weights = None if path.name == CONFIG else path
    elif not _has_any(path):
        below = _below(path)
        if len(below) > 1:
            names = listed(p.name for p in below)
            raise BrokenFileError(path, f"it holds several adapters ({names}); give one of them")
        directory, name = below[0], below[0].name
    if weights is None:
        both = [p for p in (directory / WEIGHTS, directory / _BIN) if p.is_file()]
        if len(both) > 1:
            raise BrokenFileError(
                path, f"it holds both {WEIGHTS} and {_BIN}; give one of the two files"
            )
        if not both:
            raise BrokenFileError(path, f"there is {CONFIG} and neither {WEIGHTS} nor {_BIN}")
        weights = both[0]
    config = directory / CONFIG
    if not config.is_file():
        raise BrokenFileError(
            weights,
            f"it is the weights of a PEFT adapter without the {CONFIG} that belongs beside them "
            "and tells their scales",
        )
    tensors = _open(weights)
    if isinstance(tensors, SafetensorsFile):
        shapes = {n: e.torch_shape for n, e in tensors.header.entries.items()}
    else:
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return Source(name, path, read_config(config, str(path)), tensors, shapes)


def _open(weights: Path) -> Mapping[str, Tensor]:
    if weights.suffix.lower() == ".safetensors":
        return SafetensorsFile(weights)
    content = load_pickle(fetched(weights))
    import torch

    tensors = isinstance(content, Mapping) and all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items()
    )
    if not tensors:
        raise BrokenFileError(weights, "it holds something else than tensors by name")
    return {name: tensor.detach() for name, tensor in content.items()}
