"""Writing a baked checkpoint, kind by kind: each takes a `Merging` and an open place to write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, load_json
from lora_param.errors import OutputError
from lora_param.files.header import Entry
from lora_param.files.safetensors import NAMES, StreamEntry, tensor_bytes, write_safetensors
from lora_param.files.writer import copy_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Progress", "write_directory", "write_file", "write_state_dict"]

Progress = Callable[[int, str], None]
"""Called with a number of bytes just done and what they belong to."""


def write_file(merging: Merging, part: Checkpoint, file: IO[bytes], progress: Progress) -> None:
    """Write one file of weights anew: byte for byte, but for what the merging changes."""
    touched = [name for name in part if name in merging.pieces]
    if merging.dtype is None and not touched:
        with Path(part.path).open("rb") as source:
            size = Path(part.path).stat().st_size
            copy_range(source, file, 0, size, lambda n: progress(n, Path(part.path).name))
    elif isinstance(part, SafetensorsCheckpoint):
        if merging.dtype is None:
            _patch_safetensors(merging, part, file, progress)
        else:
            _cast_safetensors(merging, part, file, progress)
    elif isinstance(part, PickleCheckpoint):
        _write_pickle(merging, part, file, progress)
    else:
        raise TypeError(type(part))


def _patch_safetensors(
    merging: Merging, part: SafetensorsCheckpoint, file: IO[bytes], progress: Progress
) -> None:
    """The same file with the targets' bytes replaced: the header and all else are copied."""
    header, done = part.header, 0
    with part.path.open("rb") as source:
        for name, entry in header.entries.items():
            if name not in merging.pieces:
                continue
            start, stop = header.start + entry.start, header.start + entry.stop
            copy_range(source, file, done, start, lambda n: progress(n, part.path.name))
            file.write(tensor_bytes(merging.stored(name, part[name])))
            progress(stop - start, name)
            done = stop
        copy_range(source, file, done, header.size, lambda n: progress(n, part.path.name))


def _cast_safetensors(
    merging: Merging, part: SafetensorsCheckpoint, file: IO[bytes], progress: Progress
) -> None:
    entries: dict[str, StreamEntry] = {}
    for name, entry in part.header.entries.items():
        dtype = _cast_name(merging, entry)
        entries[name] = (dtype, entry.shape, partial(_stored, merging, part, name))
    write_safetensors(file, entries, part.metadata, progress=progress)


def _stored(merging: Merging, part: Checkpoint, name: str) -> Tensor:
    return merging.stored(name, part[name])


def _cast_name(merging: Merging, entry: Entry) -> str:
    import torch

    dtype = getattr(torch, entry.torch_dtype, None)
    return entry.dtype if dtype is None else _name_of(merging.stored_dtype(dtype))


def _name_of(dtype: torch.dtype) -> str:
    return NAMES[str(dtype).removeprefix("torch.")]


def _write_pickle(
    merging: Merging, part: PickleCheckpoint, file: IO[bytes], progress: Progress
) -> None:
    """The same content with the state dict's tensors replaced; ties and all else stay."""
    import torch

    content = _with_replaced(part.content, part.nesting, _new_values(merging, part, progress))
    torch.save(content, file)


def _new_values(merging: Merging, part: Checkpoint, progress: Progress) -> dict[str, Tensor]:
    """The tensors that change, by name; tied names that change alike share one.

    Those that merely lie in the storage of one that changes (the weights of an LSTM are views of
    one buffer) are copied out of it, or the file would keep the whole of it beside the new tensor.
    """
    shared: dict[object, Tensor] = {}
    values: dict[str, Tensor] = {}
    touched = {_storage(part[name]) for name in part if name in merging.pieces}
    for name, weight in part.weights.items():
        W = part[name]
        progress(W.numel() * W.element_size(), name)
        if _storage(W) not in touched and merging.stored_as(W) == W.dtype:
            continue
        alike = frozenset(n for n in (name, *weight.tied) if merging.same_updates(n, name))
        value = shared.get(alike)
        if value is None:
            stored = merging.stored(name, W)
            value = shared[alike] = stored.clone() if stored is W else stored
        values[name] = value
    return values


def _storage(tensor: Tensor) -> int | None:
    """What identifies a tensor's storage; None where it has none of its own."""
    import torch

    plain = tensor.layout == torch.strided and tensor.numel() > 0
    return tensor.untyped_storage().data_ptr() if plain else None


def _with_replaced(content: Any, nesting: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    """A copy of the mappings on the way to a state dict, in which it has new values."""
    changed: Any = copy(content)
    if nesting:
        changed[nesting[0]] = _with_replaced(content[nesting[0]], nesting[1:], values)
        return changed
    for name, value in values.items():
        changed[name] = _like(content[name], value)
    return changed


def _like(old: Any, value: Tensor) -> Tensor:
    """A parameter where a parameter stood."""
    import torch

    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=old.requires_grad)
    return value


def write_state_dict(
    merging: Merging,
    state_dict: Mapping[str, Any],
    path: Path,
    file: IO[bytes],
    progress: Progress,
) -> None:
    """A live model's state dict, as safetensors or by torch.save as the path's suffix says.

    safetensors cannot tie tensors: each tied name holds its own copy there, so that a strict
    `load_state_dict` finds every name.
    """
    base = merging.base
    if path.suffix != ".safetensors":
        import torch

        torch.save(_with_replaced(state_dict, (), _new_values(merging, base, progress)), file)
        return
    import torch

    entries: dict[str, StreamEntry] = {}
    for name in state_dict:
        dtype = str(base[name].dtype).removeprefix("torch.") if name in base else "no tensor"
        if dtype not in NAMES:
            raise OutputError(path, f"safetensors cannot hold {name}, which is {dtype}")
        stored = _name_of(merging.stored_dtype(getattr(torch, dtype)))
        entries[name] = (stored, tuple(base[name].shape), partial(_stored, merging, base, name))
    write_safetensors(file, entries, {"format": "pt"}, progress=progress)


def write_directory(
    merging: Merging, base: DirectoryCheckpoint, out: Path, progress: Progress
) -> list[str]:
    """The whole directory: weights anew, the other files copied. Returns the files' names."""
    rewritten = set(base.parts)
    try:
        shutil.copytree(base.path, out, dirs_exist_ok=True, ignore=_ignoring(base.path, rewritten))
    except shutil.Error as error:  # a list of (from, to, why)
        source, _, why = error.args[0][0]
        raise OutputError(out, f"{source} cannot be copied ({why})") from error
    out.chmod(out.stat().st_mode | 0o700)  # copytree gave it the base's mode
    for name, part in base.parts.items():
        place = out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("x+b") as file:
            write_file(merging, part, file, progress)
        place.chmod(Path(part.path).stat().st_mode & 0o7777 | 0o200)
    if merging.dtype is not None:
        _cast_json(merging, base, out)
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def _ignoring(root: Path, names: set[str]) -> Callable[[str, list[str]], Iterable[str]]:
    """What copytree asks to know which files to leave out: those of `names`, under `root`."""

    def ignore(directory: str, entries: list[str]) -> Iterable[str]:
        where = Path(directory).relative_to(root)
        return {e for e in entries if (where / e).as_posix() in names}

    return ignore


def _cast_json(merging: Merging, base: DirectoryCheckpoint, out: Path) -> None:
    """The dtype and the sizes that an index and a config.json state."""
    if base.index is not None:
        index = load_json(base.index)
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = sum(
                t.numel() * merging.stored_dtype(t.dtype).itemsize for t in base.values()
            )
            _dump_json(index, out / base.index.name)
    config_path = out / "config.json"
    if config_path.is_file():
        config = load_json(config_path)
        named = {k for k in ("torch_dtype", "dtype") if isinstance(config.get(k), str)}
        for key in named:
            config[key] = str(merging.dtype).removeprefix("torch.")
        if named:
            _dump_json(config, config_path)


def _dump_json(value: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A lone surrogate, which JSON can spell and UTF-8 can't, is written as it was: \ud800.
    path.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))
