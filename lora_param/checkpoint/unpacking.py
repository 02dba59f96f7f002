"""Writing a baked checkpoint of quantized weights: dense ones, or quantized by the same format.

Dense: each quantized weight is written plainly, under the model's name, where its home entry lay;
what only the format needs (scales, its part of the config) is gone. Same: names, shapes and places
stay, and the entries of the weights that change are computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from lora_param.checkpoint.gguf import GgufCheckpoint, gguf_jobs
from lora_param.checkpoint.jobs import Job, Progress, followed, run_jobs
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.output import copy_beside, file_jobs
from lora_param.checkpoint.quantized.logical import SIDE_CONFIGS, QuantizedCheckpoint
from lora_param.checkpoint.quantized.packed import Packed
from lora_param.checkpoint.resharding import dump_json
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, load_json
from lora_param.checkpoint.streaming import (
    Copied,
    Merged,
    entry_parts,
    jobs_of,
    name_of,
    stored_name,
)
from lora_param.errors import OptionError, OutputError, worded
from lora_param.files.header import Entry
from lora_param.files.placed import PlacedFile, open_placed
from lora_param.files.safetensors import entry_size, place_entries, tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Form", "check_files", "check_form", "requantized"]
__all__ += ["write_quantized_directory", "write_quantized_file"]

Form = Literal["dense", "same"]

_CONFIGS = ("quantization_config", "compression_config")


def check_files(base: QuantizedCheckpoint, place: Path) -> None:
    """Quantized weights are written into safetensors and GGUF.

    Raises:
        OutputError: the files are others.
    """
    stored = base.stored
    files = stored.parts.values() if isinstance(stored, DirectoryCheckpoint) else [stored]
    if not all(isinstance(file, SafetensorsCheckpoint | GgufCheckpoint) for file in files):
        raise OutputError(
            place,
            f"{base.path} holds quantized weights in a file of torch.save, which can be read and "
            f"not baked: save it with safetensors first",
        )


def check_form(merging: Merging, base: QuantizedCheckpoint, form: Form) -> None:
    """Can the result be written this way? Asked before a byte is.

    Raises:
        OptionError: a format that can only be read is asked to be written.
        OutputError: something in it cannot be read, and so not be made dense.
    """
    if form == "dense" and base.refused:
        name, reason = next(iter(base.refused.items()))
        raise OutputError(
            base.path, f"{name} cannot be read ({reason}), and would not fit a dense checkpoint"
        )
    touched = (w for n, w in base.packed.items() if n in merging.pieces)
    fixed = {w.kind for w in touched if w.encode is None} if form == "same" else set()
    if fixed:
        can = "dense: this format can be read, not written"
        option = f"{worded('quantized', '--as')} for {', '.join(sorted(fixed))}"
        raise OptionError(option, form, can)
    if form == "same" and merging.dtype is not None:
        same = worded("quantized='same'", "--as same")
        raise OptionError(worded("dtype", "--dtype"), str(merging.dtype), f"none with {same}")


def write_quantized_file(
    merging: Merging, base: QuantizedCheckpoint, form: Form, file: IO[bytes], progress: Progress
) -> None:
    """Write one file of weights anew."""
    part = base.stored
    if isinstance(part, GgufCheckpoint):
        dense = {n: w.dtype for n, w in base.packed.items()} if form == "dense" else {}
        requantize = partial(requantized, merging, base, noted=True)
        run_jobs(gguf_jobs(merging, part, file, dense, requantize), progress)
        return
    assert isinstance(part, SafetensorsCheckpoint)
    run_jobs(_jobs(merging, base, part, file, form), progress)


def write_quantized_directory(
    merging: Merging, base: QuantizedCheckpoint, form: Form, out: Path, progress: Progress
) -> list[str]:
    """The whole directory: weights anew, configs that fit them, other files copied."""
    stored = base.stored
    assert isinstance(stored, DirectoryCheckpoint)
    rewritten = set(stored.parts)
    if form == "dense":
        rewritten |= {*SIDE_CONFIGS, *([stored.index.name] if stored.index else [])}
    copy_beside(stored.path, out, rewritten)
    with ExitStack() as files:
        run_jobs(_directory_jobs(merging, base, stored, out, files, form), progress)
    if form == "dense":
        _write_index(merging, base, stored, out)
        _write_config(merging, out / "config.json")
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def _directory_jobs(
    merging: Merging,
    base: QuantizedCheckpoint,
    stored: DirectoryCheckpoint,
    out: Path,
    files: ExitStack,
    form: Form,
) -> Iterator[Job]:
    for name, part in stored.parts.items():
        assert isinstance(part, SafetensorsCheckpoint)
        if form == "dense" and not _dense_entries(merging, base, part):
            continue  # it held nothing but scales
        place = out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        file = files.enter_context(open_placed(place))
        yield from followed(_jobs(merging, base, part, file, form), file.close)


def _jobs(
    merging: Merging,
    base: QuantizedCheckpoint,
    part: SafetensorsCheckpoint,
    file: IO[bytes],
    form: Form,
) -> Iterator[Job]:
    part.check_unchanged()
    make = _dense_jobs if form == "dense" else _same_jobs
    yield from make(merging, base, part, file)


# --- dense ------------------------------------------------------------------------------------


def _dense_entries(
    merging: Merging, base: QuantizedCheckpoint, part: SafetensorsCheckpoint
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file holds when its quantized weights are plain: name → dtype and shape."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in part.header.entries.items():
        if (packed := base.homes.get(name)) is not None:
            entries[packed.name] = (_dense_dtype(merging, packed), packed.shape)
        elif name in base.weights:
            entries[name] = (stored_name(merging, entry), entry.shape)
    return entries


def _dense_dtype(merging: Merging, packed: Packed) -> str:
    return name_of(merging.stored_dtype(packed_dtype(packed)))


def packed_dtype(packed: Packed) -> torch.dtype:
    """The dtype of a quantized weight's numbers."""
    import torch

    dtype: torch.dtype = getattr(torch, packed.dtype)
    return dtype


def _dense_jobs(
    merging: Merging, base: QuantizedCheckpoint, part: SafetensorsCheckpoint, file: IO[bytes]
) -> Iterator[Job]:
    entries = _dense_entries(merging, base, part)
    plain = {k: v for k, v in part.metadata.items() if k not in base.told}
    text, placed, size = place_entries(entries, plain, part.path.name)
    target = PlacedFile(file, len(text) + size)
    target.write(text, 0)
    yield from jobs_of(merging, target, _dense_parts(merging, base, part, placed, len(text)))


def _dense_parts(
    merging: Merging,
    base: QuantizedCheckpoint,
    part: SafetensorsCheckpoint,
    placed: Mapping[str, Entry],
    first: int,
) -> Iterator[Copied | Merged]:
    for name, entry in placed.items():
        if name not in base.packed:
            yield from entry_parts(merging, part, {name: entry}, first)
            continue
        itemsize = merging.stored_dtype(packed_dtype(base.packed[name])).itemsize
        blocks = tuple(merging.cover(name, entry.shape))
        yield Merged(base, name, blocks, first + entry.start, itemsize)


def _write_index(
    merging: Merging, base: QuantizedCheckpoint, stored: DirectoryCheckpoint, out: Path
) -> None:
    if stored.index is None:
        return
    index = load_json(stored.index)
    home: dict[str, str] = {}
    size = 0
    for file, part in stored.parts.items():
        assert isinstance(part, SafetensorsCheckpoint)
        entries = _dense_entries(merging, base, part)
        home |= dict.fromkeys(entries, file)
        size += sum(entry_size(*kind) for kind in entries.values())
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    dump_json({**index, "weight_map": home}, out / stored.index.name)


def _write_config(merging: Merging, path: Path) -> None:
    """config.json without what it says of the quantization, and with the dtype asked for."""
    if not path.is_file():
        return
    config = load_json(path)
    inner = config.get("text_config")
    for place in [config, inner] if isinstance(inner, dict) else [config]:
        for key in _CONFIGS:
            place.pop(key, None)
        for key in ("torch_dtype", "dtype"):
            if merging.dtype is not None and isinstance(place.get(key), str):
                place[key] = str(merging.dtype).removeprefix("torch.")
    dump_json(config, path)


# --- the same format --------------------------------------------------------------------------


def requantized(
    merging: Merging, base: QuantizedCheckpoint, name: str, *, noted: bool = False
) -> dict[str, Tensor]:
    """What W + ΔW is in the format that stores W: tensors by entry.

    Args:
        noted: this is what will be reported of its targets.
    """
    import torch

    packed = base.packed[name]
    assert packed.encode is not None
    with torch.no_grad():
        parts = base.parts(name)
        W = packed.decode(parts)
        parts = packed.encode(merging.stored(name, W), parts)
        if noted:
            merging.note_stored(name, W, packed.decode(parts))
    return {packed.entries[role]: tensor for role, tensor in parts.items()}


def _same_jobs(
    merging: Merging, base: QuantizedCheckpoint, part: SafetensorsCheckpoint, file: IO[bytes]
) -> Iterator[Job]:
    touched = [w for n, w in base.packed.items() if n in merging.pieces]
    own = [w for w in touched if any(n in part for n in w.entries.values())]
    if not own:
        yield from file_jobs(merging, part, file)
        return
    header = part.header
    computed = {n for w in own for n in w.entries.values()}
    kept = {n: e for n, e in header.entries.items() if n not in computed}
    target = PlacedFile(file, header.size)
    first = Copied(part.path, 0, header.start, 0)
    rest = entry_parts(merging, part, kept, header.start)
    yield from jobs_of(merging, target, [first, *rest])
    for packed in own:
        size = sum(
            header.entries[n].stop - header.entries[n].start
            for n in packed.entries.values()
            if n in part
        )
        run = partial(_write_packed, merging, base, part, target, packed)
        yield Job(run, size, packed.name)


def _write_packed(
    merging: Merging,
    base: QuantizedCheckpoint,
    part: SafetensorsCheckpoint,
    target: PlacedFile,
    packed: Packed,
) -> None:
    new = requantized(merging, base, packed.name, noted=packed.home in part)
    for name, tensor in new.items():
        if name in part:
            target.write(tensor_bytes(tensor), part.header.start + part.header.entries[name].start)
