"""`.pt`, `.pth`, `.bin` and `.ckpt` files: what `torch.save` wrote, never by running its code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint, packed_reason
from lora_param.checkpoint.unpickling import load_pickle
from lora_param.errors import (
    BrokenFileError,
    OptionError,
    UnknownFileError,
    listed,
    worded,
)
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import torch

__all__ = [
    "SUFFIXES",
    "PickleCheckpoint",
    "choose_state_dict",
    "data_of",
    "describe_tensors",
    "find_state_dicts",
]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""What files of `torch.save` are called."""

# In the order in which they are preferred where several hold a state dict.
_PREFERRED = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "generator_ema",
    "ema",
    "ema_model",
    "model_ema",
    "state_dict_ema",
)
_OPTIMIZER_KEYS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq", "square_avg"}
_MAX_DEPTH = 4


class PickleCheckpoint(Checkpoint):
    """A state dict in a file of `torch.save`, at its top level or nested.

    Attributes:
        content: all that the file holds; tensors of zip files are mapped, not read.
        key: dotted name of the state dict, "" for the top level.
        nesting: the same as a path of keys, each of which may hold dots itself.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is empty, truncated, or no file of torch.save.
        UnsafePickleError: opening it would run code.
        UnknownFileError: it holds no state dict, or several and none that is usually meant.
        OptionError: there is no state dict of this key.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str], key: str | None = None) -> None:
        self.path = Path(path)
        self.content: Any = load_pickle(self.path)
        found = find_state_dicts(self.content)
        what = "a file of torch.save"
        self.nesting = choose_state_dict(self.path, what, self.content, found, key)
        self.key = ".".join(self.nesting)
        self.state_dict: Mapping[str, Any] = found[self.nesting]

    def _describe(self) -> dict[str, Weight]:
        return describe_tensors(self.state_dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise KeyError(name)
        return data_of(self.state_dict[name], name, self.path)


def data_of(tensor: torch.Tensor, name: str, path: object) -> torch.Tensor:
    """The tensor on the CPU, without gradient.

    Raises:
        BrokenFileError: it is on the meta device, which holds no data.
    """
    if tensor.is_meta:
        raise BrokenFileError(path, f"{name} is on the meta device, so that it has no data")
    return tensor.detach().cpu()


def describe_tensors(state_dict: Mapping[str, Any]) -> dict[str, Weight]:
    """`Weight`s of the tensors in a mapping; names with one storage, offset and shape are tied."""
    import torch

    tensors = {n: t for n, t in state_dict.items() if isinstance(t, torch.Tensor)}
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tie_of(tensor) or name, []).append(name)
    return {
        name: Weight(
            name,
            (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            tied=tuple(n for n in groups[tie_of(tensor) or name] if n != name),
            packed=packed_reason(name, tensors) or _layout_reason(tensor),
        )
        for name, tensor in tensors.items()
    }


def _layout_reason(tensor: torch.Tensor) -> str:
    """Why a tensor is no dense block of numbers, or ""."""
    import torch

    if tensor.is_quantized:
        return f"quantized, of dtype {tensor.dtype}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"sparse, of layout {tensor.layout}"
    return ""


def tie_of(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What two tensors share if they are one under two names; None where nothing can be shared."""
    import torch

    if tensor.is_nested or tensor.layout != torch.strided or not tensor.numel() or tensor.is_meta:
        return None
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def find_state_dicts(
    content: object, tensor: type | None = None
) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """Every state dict in what a file holds, by the path of keys to it; () is the top level.

    A state dict maps texts to values that are mostly tensors. Optimizer states are none.

    Args:
        content: what it holds.
        tensor: the class that stands for a tensor in it; torch's own by default.
    """
    if tensor is None:
        import torch

        tensor = torch.Tensor
    return _search(content, (), {}, tensor)


def _search(
    value: object, path: tuple[str, ...], seen: dict[int, bool], tensor: type
) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """State dicts in a value at a path.

    Each mapping is entered once, for a file can hold one in many places, and in itself. `seen`
    tells by its id whether it is a state dict, which is then found in each place.
    """
    if not isinstance(value, Mapping) or len(path) > _MAX_DEPTH or _is_optimizer(value, path):
        return {}
    if id(value) in seen:
        return {path: value} if seen[id(value)] else {}
    seen[id(value)] = False
    inner: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for name, item in value.items():
        if isinstance(name, str):
            inner |= _search(item, (*path, name), seen, tensor)
    # A state dict may keep a module's extra state as a mapping; a checkpoint may keep a few loose
    # tensors beside its state dict. What the mapping is called tells them apart.
    if _is_state_dict(value, tensor) and not any(p[len(path)] in _PREFERRED for p in inner):
        seen[id(value)] = True
        return {path: value}
    return inner


def _is_state_dict(value: Mapping[Any, Any], tensor: type) -> bool:
    if not all(isinstance(name, str) for name in value):
        return False
    tensors = sum(isinstance(item, tensor) for item in value.values())
    return tensors > 0 and 2 * tensors > len(value)


def _is_optimizer(value: Mapping[Any, Any], path: Sequence[str]) -> bool:
    if "param_groups" in value or (path and "optim" in path[-1].lower()):
        return True
    return any(isinstance(k, str) and k.rpartition(".")[2] in _OPTIMIZER_KEYS for k in value)


def choose_state_dict(
    file: Path,
    kind: str,
    content: object,
    found: Mapping[tuple[str, ...], Mapping[str, Any]],
    key: str | None,
) -> tuple[str, ...]:
    """The path of keys to the state dict that is meant.

    Args:
        file: where it is.
        kind: what that is, for messages.
        content: all that it holds.
        found: the state dicts in it.
        key: the dotted name of the one that is asked for, if one is.

    Raises:
        OptionError: there is none of this name.
        UnknownFileError: there is none, or several and none that is usually meant.
    """
    keys = {".".join(path): path for path in found}
    if key is not None:
        if key not in keys:
            shown = ", ".join(k or "'' (the top level)" for k in keys) or "nothing: it has none"
            raise OptionError(f"{worded('key', '--key')} for {file}", key, shown)
        return keys[key]
    if not found:
        what = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            what += f" with the keys {listed(map(str, content))}"
        raise UnknownFileError(
            file,
            f"{kind} that holds {what}",
            "a state dict, or a dict with one in it",
        )
    if len(found) == 1:
        return next(iter(found))
    ranked = sorted(
        (tuple(_PREFERRED.index(part) for part in path), path)
        for path in found
        if all(part in _PREFERRED for part in path)
    )
    if not ranked:
        raise UnknownFileError(
            file,
            f"{kind} with several state dicts ({', '.join(keys)})",
            f"one of them, chosen with {worded('key=...', '--key')}",
        )
    return ranked[0][1]
