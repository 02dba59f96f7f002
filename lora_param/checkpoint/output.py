"""Writing a baked checkpoint, kind by kind: each takes a `Merging` and an open place to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.checkpoint.archive import archive_jobs
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.jobs import Job, Progress, followed, run_jobs
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.resharding import dump_json, resharded_jobs
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, load_json
from lora_param.checkpoint.streaming import Copied, entry_parts, jobs_of, name_of, stored_name
from lora_param.errors import OutputError
from lora_param.files.placed import PlacedFile, clone_file, open_placed
from lora_param.files.places import copy_file, files_below, is_far, place
from lora_param.files.safetensors import NAMES, StreamEntry, place_entries, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Progress", "copy_beside", "file_jobs", "link_file", "write_directory", "write_file"]
__all__ += ["write_state_dict"]


def write_file(merging: Merging, part: Checkpoint, file: IO[bytes], progress: Progress) -> None:
    """Write one file of weights anew: byte for byte, but for what the merging changes.

    Of safetensors and of the zip files of torch.save no more than some blocks are in memory.
    """
    run_jobs(file_jobs(merging, part, file), progress)


def file_jobs(merging: Merging, part: Checkpoint, file: IO[bytes]) -> Iterator[Job]:
    """The jobs that write one file of weights into an empty one."""
    path = place(part.path)
    if is_untouched(merging, part):
        if not clone_file(path, file):
            size = path.stat().st_size
            yield from jobs_of(merging, PlacedFile(file, size), [Copied(path, 0, size, 0)])
    elif isinstance(part, SafetensorsCheckpoint):
        part.check_unchanged()
        yield from _safetensors_jobs(merging, part, file)
    elif isinstance(part, PickleCheckpoint):
        jobs = archive_jobs(merging, part, file)
        whole = Job(partial(_write_pickle, merging, part, file), part.nbytes, path.name)
        yield from [whole] if jobs is None else jobs
    else:
        raise TypeError(type(part))


def is_untouched(merging: Merging, part: Checkpoint) -> bool:
    """Nothing in this file changes."""
    return merging.dtype is None and not any(name in merging.pieces for name in part)


def _safetensors_jobs(
    merging: Merging, part: SafetensorsCheckpoint, file: IO[bytes]
) -> Iterator[Job]:
    """The same names, in the same places where no dtype changes: then the header is copied."""
    header = part.header
    if merging.dtype is None:
        start, placed, size = header.start, header.entries, header.size - header.start
        first = Copied(part.path, 0, start, 0)
        yield from jobs_of(
            merging,
            PlacedFile(file, start + size),
            [first, *entry_parts(merging, part, placed, start)],
        )
        return
    text, placed, size = place_entries(
        {n: (stored_name(merging, e), e.shape) for n, e in header.entries.items()},
        part.metadata,
        part.path.name,
    )
    target = PlacedFile(file, len(text) + size)
    target.write(text, 0)
    yield from jobs_of(merging, target, entry_parts(merging, part, placed, len(text)))


def _write_pickle(merging: Merging, part: PickleCheckpoint, file: IO[bytes]) -> None:
    """The same content with the state dict's tensors replaced; ties and all else stay."""
    import torch

    values = _new_values(merging, part, lambda *_: None)
    file.seek(0)
    file.truncate()
    torch.save(_with_replaced(part.content, part.nesting, values), file)


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
            stored = merging.stored(name, W, noted=True)
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

    def content(name: str) -> Tensor:
        return merging.stored(name, base[name], noted=True)

    for name in state_dict:
        dtype = str(base[name].dtype).removeprefix("torch.") if name in base else "no tensor"
        if dtype not in NAMES:
            raise OutputError(path, f"safetensors cannot hold {name}, which is {dtype}")
        stored = name_of(merging.stored_dtype(getattr(torch, dtype)))
        entries[name] = (stored, tuple(base[name].shape), partial(content, name))
    write_safetensors(file, entries, {"format": "pt"}, progress=progress)


def write_directory(
    merging: Merging, base: DirectoryCheckpoint, out: Path, progress: Progress
) -> list[str]:
    """The whole directory: weights anew, the other files copied. Returns the files' names."""
    rewritten = set(base.parts)
    if merging.max_shard_size is not None and base.index is not None:
        rewritten.add(base.index.name)
    copy_beside(base.path, out, rewritten)
    with ExitStack() as files:
        if merging.max_shard_size is None:
            jobs = _shard_jobs(merging, base, out, files)
        else:
            jobs = resharded_jobs(merging, base, out, files, merging.max_shard_size)
        run_jobs(jobs, progress)
    if merging.dtype is not None:
        _cast_json(merging, base, out)
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def copy_beside(folder: Path, out: Path, rewritten: set[str]) -> None:
    """Copy a directory's files but those that are written anew."""
    if is_far(folder):
        for path in files_below(folder):
            name = path.relative_to(folder).as_posix()
            if name not in rewritten:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).unlink(missing_ok=True)  # what a killed process left
                copy_file(path, out / name)
        return
    try:
        shutil.copytree(
            folder,
            out,
            dirs_exist_ok=True,
            ignore=_ignoring(folder, rewritten),
            copy_function=_copy_anew,
        )
    except shutil.Error as error:  # a list of (from, to, why)
        source, _, why = error.args[0][0]
        raise OutputError(out, f"{source} cannot be copied ({why})") from error
    out.chmod(out.stat().st_mode | 0o700)  # copytree gave it the base's mode


def _copy_anew(source: str, place: str) -> None:
    """Copy a file to where nothing is, or what a killed process left, perhaps read-only."""
    Path(place).unlink(missing_ok=True)
    shutil.copy2(source, place)


def _shard_jobs(
    merging: Merging, base: DirectoryCheckpoint, out: Path, files: ExitStack
) -> Iterator[Job]:
    """The jobs of all shards, each of which is closed as soon as it is written."""

    def finish(file: IO[bytes], part: Checkpoint) -> None:
        file.close()
        Path(file.name).chmod(place(part.path).stat().st_mode & 0o7777 | 0o200)

    for name, part in base.parts.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if merging.link and is_untouched(merging, part) and link_file(place(part.path), target):
            continue
        file = files.enter_context(open_placed(target))
        yield from followed(file_jobs(merging, part, file), partial(finish, file, part))


def link_file(source: Path, place: Path) -> bool:
    """Make a hard link; False where the file system cannot, or they are of two."""
    try:
        place.hardlink_to(source.resolve())
    except FileExistsError:  # of a bake that is gone on with
        return place.samefile(source)
    except OSError:
        return False
    return True


def _ignoring(root: Path, names: set[str]) -> Callable[[str, list[str]], Iterable[str]]:
    """What copytree asks to know which files to leave out: those of `names`, under `root`."""

    def ignore(directory: str, entries: list[str]) -> Iterable[str]:
        where = Path(directory).relative_to(root)
        return {e for e in entries if (where / e).as_posix() in names}

    return ignore


def _cast_json(merging: Merging, base: DirectoryCheckpoint, out: Path) -> None:
    """The dtype and the sizes that an index and a config.json state."""
    if base.index is not None and merging.max_shard_size is None:
        index = load_json(base.index)
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = sum(
                t.numel() * merging.stored_dtype(t.dtype).itemsize for t in base.values()
            )
            dump_json(index, out / base.index.name)
    config_path = out / "config.json"
    if config_path.is_file():
        config = load_json(config_path)
        named = {k for k in ("torch_dtype", "dtype") if isinstance(config.get(k), str)}
        for key in named:
            config[key] = str(merging.dtype).removeprefix("torch.")
        if named:
            dump_json(config, config_path)
