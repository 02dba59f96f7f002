"""`.pt`, `.pth`, `.bin` and `.ckpt` files: what `torch.save` wrote, never by running its code."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint, packed_reason
from lora_param.errors import (
    BrokenFileError,
    FileError,
    MissingFileError,
    OptionError,
    UnknownFileError,
    UnsafePickleError,
    listed,
)
from lora_param.files.places import place
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import torch

__all__ = [
    "SUFFIXES",
    "PickleCheckpoint",
    "check_archive",
    "choose_state_dict",
    "data_of",
    "describe_tensors",
    "find_state_dicts",
    "is_zip",
    "load_pickle",
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


def is_zip(path: str | os.PathLike[str]) -> bool:
    """The file begins as a zip archive, which is what torch.save writes since 1.6."""
    with place(path).open("rb", buffering=0) as file:
        return file.read(4) == b"PK\x03\x04"


def load_pickle(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU; runs none of its code.

    Raises:
        MissingFileError, BrokenFileError, UnsafePickleError, UnknownFileError: see
            `PickleCheckpoint`.
    """
    import torch

    try:
        zipped = is_zip(path)
        if path.stat().st_size == 0:
            raise BrokenFileError(path, "it is empty")
    except FileNotFoundError:
        raise MissingFileError(path, "a file written by torch.save") from None
    except FileError:
        raise
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error
    if zipped:
        with path.open("rb") as file:
            check_archive(file, path)
    try:
        with warnings.catch_warnings():
            # Of pickle protocols, sparse and quantized tensors, storages read by older means: what
            # torch then makes of them is checked like the rest.
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        with warnings.catch_warnings(action="ignore"):  # of escapes in damaged texts
            needs = _unsafe_globals(path, zipped)
        if needs:
            raise UnsafePickleError(path, f"it needs {needs[0]}") from None
        raise BrokenFileError(path, "it is no file of torch.save, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        raise BrokenFileError(path, f"it is truncated or damaged ({reason[:160]})") from None
    except Exception as error:
        # The unpickler does what the bytes say, on values of any type: what it trips over in bytes
        # that are damaged can be any exception that Python has.
        raise BrokenFileError(path, f"it is damaged ({type(error).__name__})") from None


def check_archive(file: IO[bytes], path: Path) -> None:
    """A whole zip archive of torch.save, of no more bytes than the open file has.

    torch.save compresses nothing: a record that is inflated may take all memory, and the data of a
    tensor would be read as they lie in the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BrokenFileError(path, f"it is a truncated or damaged zip archive ({error})") from None
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnknownFileError(
            path,
            "a TorchScript archive, which is a program",
            "a state dict: save torch.jit.load(path).state_dict() with safetensors or torch.save",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise UnknownFileError(path, "a zip archive of another kind", "a file of torch.save")
    size = file.seek(0, os.SEEK_END)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise BrokenFileError(
                path,
                f"its record {record.filename} is compressed, to {record.compress_size:,} bytes of "
                f"{record.file_size:,}, as torch.save never does",
            )


def _unsafe_globals(path: Path, zipped: bool) -> list[str]:
    """What a file needs that is not allowed, as far as its opcodes can be read; [] if they can't.

    torch looks into archives of its own alone, so that the pickle of an older file is shown to it
    in such a one. Of pickles that torch does not write, every global is listed.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    source: Any = path
    try:
        if not zipped:
            source = io.BytesIO()
            with zipfile.ZipFile(source, "w") as archive:
                archive.writestr("archive/data.pkl", _last_pickle(path))
                archive.writestr("archive/version", "3")
            source.seek(0)
        return sorted(get_unsafe_globals_in_checkpoint(source))
    except Exception:  # of damaged bytes, see load_pickle
        return _plain_pickle_globals(path)


def _last_pickle(path: Path) -> bytes:
    """Of the pickles in which torch.save wrote a file before 1.6, the fourth: the content."""
    with path.open("rb") as file:
        for _ in range(3):
            for _ in pickletools.genops(file):
                pass
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        stop = file.tell()
        file.seek(start)
        return file.read(stop - start)


def _plain_pickle_globals(path: Path) -> list[str]:
    """The globals that a plain pickle names, found by reading its opcodes; [] if it is none."""
    found: list[str] = []
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except (ValueError, UnicodeError, IndexError, OSError, OverflowError, struct.error):
        return []
    return found


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
            raise OptionError(f"key (--key) for {file}", key, shown)
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
            "one of them, chosen with key=... (--key)",
        )
    return ranked[0][1]
