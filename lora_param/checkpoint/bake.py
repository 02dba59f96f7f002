"""Baking: W + ΔW written where W stood, in a checkpoint of the same names, shapes and files.

Everything is read and checked first, the output is built beside its place, and only then takes
it: an error, a full disk or a killed process leaves what was there.

The room is long for its checks of the output: they belong before the first byte, beside the write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args

from lora_param.adapter import Adapter
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.chunks import write_distributed
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.measures import BakedTarget
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.module import ModuleCheckpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.original import advice, quantization_errors
from lora_param.checkpoint.output import write_directory, write_file, write_state_dict
from lora_param.checkpoint.plan import plan_merging
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint
from lora_param.checkpoint.reread import (
    verify_directory,
    verify_distributed,
    verify_file,
    verify_quantized,
)
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, find_weights
from lora_param.checkpoint.unpacking import (
    Form,
    check_form,
    write_quantized_directory,
    write_quantized_file,
)
from lora_param.errors import (
    FileError,
    OptionError,
    OutputError,
    QuantizationLossError,
    UnchangedError,
)
from lora_param.files.locks import State, locked
from lora_param.files.places import writable
from lora_param.files.writer import check_output, replace_directory, replace_file
from lora_param.printing import Printed
from lora_param.weight.blocks import one_thread

if TYPE_CHECKING:
    import torch

__all__ = ["BakeOptions", "BakeReport", "bake_adapters", "parse_dtype"]

Path_ = str | os.PathLike[str]
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
_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
_DIRECTORIES = (DirectoryCheckpoint, DistributedCheckpoint)
_LEAST = 0.5  # of an update that has to be left of it where it is quantized


@dataclass(frozen=True)
class BakeReport(Printed):
    """What a bake did. Prints itself; `to_dict` gives it as data.

    Attributes:
        path: where the result is.
        rows: one for each enabled target.
        disabled: keys of the targets that took no part.
        dead: names of the adapters that are enabled and yet change nothing, for their factors
            are zero.
        files: names of the files written, relative to `path` where that is a directory.
        bytes: their size.
        key: the nested state dict that was baked, "" for the whole file.
        verified: the result was read again and compared.
        notes: what the caller should know, one sentence each.
        quantized: how quantized weights were written, "dense" or "same"; "" where there are none.
    """

    path: Path
    rows: tuple[BakedTarget, ...]
    disabled: tuple[str, ...]
    dead: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    key: str = ""
    verified: bool = False
    notes: tuple[str, ...] = ()
    quantized: str = ""
    view: ClassVar[str] = "bake_view"

    @property
    def baked(self) -> tuple[str, ...]:
        """Keys of the enabled targets."""
        return tuple(row.target for row in self.rows)

    @property
    def changed(self) -> int:
        """Number of elements that differ from the base."""
        return sum({row.target: row.changed for row in self.rows}.values())

    @property
    def lost(self) -> tuple[str, ...]:
        """Keys of targets whose update the stored dtype kept nothing of."""
        return tuple(row.target for row in self.rows if row.lost)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "path": str(self.path),
            "baked": list(self.baked),
            "disabled": list(self.disabled),
            "dead": list(self.dead),
            "lost": list(self.lost),
            "changed": self.changed,
            "rows": [row.to_dict() for row in self.rows],
            "files": list(self.files),
            "bytes": self.bytes,
            "key": self.key,
            "verified": self.verified,
            "notes": list(self.notes),
            "quantized": self.quantized,
        }

    def __repr__(self) -> str:
        total = len(self.rows) + len(self.disabled)
        return f"<BakeReport: {len(self.rows)} of {total} targets, {str(self.path)!r}>"


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from torch's or a short name of it.

    Raises:
        OptionError: it is none that a whole checkpoint can be stored in.
    """
    import torch

    if dtype is None:
        return None
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
    original: Path_ | None = None


def bake_adapters(
    base: Path_,
    adapters: Sequence[tuple[Adapter, float]],
    out: Path_ | None = None,
    options: BakeOptions = BakeOptions(),
) -> BakeReport:
    """Bake adapters into a checkpoint; `lora_param.bake_checkpoint` takes their paths as well.

    Args:
        base: a checkpoint of any kind that `open_checkpoint` takes.
        adapters: each with what its update is multiplied by. Updates of one weight are added in
            fp32 and rounded once.
        out: where the result goes: a file for a file, a directory for a directory. Names, shapes
            and other files are the base's.
        options: how.

    Raises:
        UnchangedError: see `BakeOptions.require_change`.
        AdapterError: an adapter does not fit, or holds values that are not finite.
        FileError: something cannot be read, or the output cannot or must not be written.
        OptionError: a setting outside its accepted values.
    """
    dtype = parse_dtype(options.dtype)
    limit = None if options.max_shard_size is None else parse_size(options.max_shard_size)
    if not adapters:
        raise OptionError("adapters", [], "at least one adapter")
    if options.quantized not in (None, *get_args(Form)):
        raise OptionError("quantized (--as)", options.quantized, ", ".join(get_args(Form)))
    with (
        _held(base) if options.in_place else nullcontext() as state,
        closing(open_checkpoint(base, options.key)) as checkpoint,
        nullcontext()
        if options.original is None
        else open_checkpoint(options.original) as original,
    ):
        place = _place(checkpoint, base, out, options.in_place)
        _check_place(_stored(checkpoint), adapters, place, options)
        if limit is not None and not _has_shards(checkpoint):
            raise OptionError(
                "max_shard_size",
                options.max_shard_size,
                "None: the base is no directory of safetensors that are stored as they are",
            )
        if dtype is not None and isinstance(checkpoint, DistributedCheckpoint):
            raise OptionError("dtype", str(dtype), "None: a distributed checkpoint keeps its own")
        form, errors = _form(checkpoint, options), dict[str, float]()
        with one_thread():
            merging = plan_merging(
                checkpoint, adapters, dtype=dtype, check_fingerprint=options.check_fingerprint
            )
        merging.exact, merging.link, merging.max_shard_size = options.verify, options.link, limit
        merging.casts_vectors = not isinstance(_stored(checkpoint), GgufCheckpoint)
        if isinstance(checkpoint, QuantizedCheckpoint) and form is not None:
            check_form(merging, checkpoint, form)
            if original is not None:
                errors = quantization_errors(merging, checkpoint, original)
                merging.exact = True
        files, size = _write(merging, place, options, state, form)
        with one_thread():
            found = merging.rows(errors)
        rows = list(found.values())
        dead = [
            a.name
            for a in merging.adapters
            if (own := [row for key, row in found.items() if key[0] == id(a)])
            and all(row.dead for row in own)
        ]
        return BakeReport(
            place,
            tuple(rows),
            tuple(merging.disabled),
            tuple(dead),
            tuple(files),
            size,
            checkpoint.key,
            options.verify,
            (
                *_notes(_stored(checkpoint), rows, form, options),
                *(n for a in merging.adapters for n in a.notes),
            ),
            (form or "") if getattr(checkpoint, "packed", None) else "",
        )


def _stored(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint.stored if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint


def _form(checkpoint: Checkpoint, options: BakeOptions) -> Form | None:
    """How quantized weights are written; None where the base has none."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        only_refused = checkpoint.refused and not checkpoint.packed
        return options.quantized or ("same" if only_refused else "dense")
    for name, value in (("quantized (--as)", options.quantized), ("original", options.original)):
        if value is not None:
            raise OptionError(name, str(value), "None: the base is not quantized")
    return None


def _held(base: Path_) -> AbstractContextManager[State | None]:
    """The lock of what is read and replaced in place: a second bake of it waits for the first."""
    path = writable(base)
    return locked(path.parent if path.name.endswith(".index.json") else path)


def _place(checkpoint: Checkpoint, base: Path_, out: Path_ | None, in_place: bool) -> Path:
    """Where the result goes: the output asked for, or the base itself."""
    if isinstance(checkpoint.path, str):
        if out is None or in_place:
            raise OutputError(base, "a model that a call builds needs an output file of its own")
        return writable(out)
    own = checkpoint.path
    if out is None:
        if not in_place:
            raise OptionError("out", None, "a path, or in_place=True (--in-place)")
        return own
    same = os.path.realpath(out) in (os.path.realpath(own), os.path.realpath(base))
    if same and not in_place:
        raise OutputError(out, "it is the input; give another path, or in_place=True (--in-place)")
    if in_place and not same:
        raise OptionError("out", str(out), "nothing but the input, with in_place=True")
    return own if in_place else writable(out)


def _check_place(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    place: Path,
    options: BakeOptions,
) -> None:
    in_place, directory = options.in_place, isinstance(checkpoint, _DIRECTORIES)
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
        if not in_place and suffix in (".safetensors", *_PICKLES):
            raise OutputError(
                place, f"the input is a directory, and so the output; its name ends in {suffix}"
            )
        if real.is_dir():
            _check_replaceable(real)
    elif isinstance(checkpoint.path, str):
        if suffix != ".safetensors" and suffix not in _PICKLES:
            raise OutputError(
                place, "its name ends in none of .safetensors, .pt, .pth, .bin, .ckpt"
            )
    elif isinstance(checkpoint, GgufCheckpoint):
        if suffix != ".gguf":
            raise OutputError(
                place, "the input is a GGUF file, and so is the output: name it .gguf"
            )
    elif isinstance(checkpoint, SafetensorsCheckpoint) and suffix in _PICKLES:
        raise OutputError(place, "the input is a .safetensors file, and so the output: name it so")
    elif not isinstance(checkpoint, SafetensorsCheckpoint) and suffix == ".safetensors":
        raise OutputError(place, "the input is from torch.save, and so the output: name it .pt")


def _has_shards(checkpoint: Checkpoint) -> bool:
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


def _write(
    merging: Merging,
    place: Path,
    options: BakeOptions,
    replaces: State | None,
    form: Form | None,
) -> tuple[list[str], int]:
    """Write the result; its files' names and their size together."""
    base, progress = merging.base, options.progress
    force, sync = options.force or options.in_place, options.sync
    done, total = 0, base.nbytes * (2 if options.verify else 1)

    def tick(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, name)

    if isinstance(_stored(base), _DIRECTORIES):
        with replace_directory(place, force=force, sync=sync, replaces=replaces) as temporary:
            if isinstance(base, DirectoryCheckpoint):
                files = write_directory(merging, base, temporary, tick)
            elif isinstance(base, DistributedCheckpoint):
                files = write_distributed(merging, base, temporary, tick)
            else:
                files = write_quantized_directory(merging, *_packed(base, form), temporary, tick)
            _check_result(merging, options, form)
            size = sum((temporary / name).stat().st_size for name in files)
            if options.verify and form is not None:
                verify_quantized(merging, *_packed(base, form), temporary, tick)
            elif options.verify and isinstance(base, DistributedCheckpoint):
                verify_distributed(merging, base, temporary, tick)
            elif options.verify:
                assert isinstance(base, DirectoryCheckpoint)
                verify_directory(merging, base, temporary, tick)
    else:
        files = [place.name]
        with replace_file(place, force=force, sync=sync, replaces=replaces) as file:
            if isinstance(base, ModuleCheckpoint):
                write_state_dict(merging, base.state_dict, place, file, tick)
            elif form is not None:
                write_quantized_file(merging, *_packed(base, form), file, tick)
            else:
                write_file(merging, base, file, tick)
            _check_result(merging, options, form)
            file.flush()
            size = os.fstat(file.fileno()).st_size
            if options.verify and form is not None:
                verify_quantized(merging, *_packed(base, form), Path(file.name), tick)
            elif options.verify:
                verify_file(merging, base, Path(file.name), tick, place)
    if progress is not None:
        progress(total, total, place.name)  # a smaller dtype writes less than was announced
    return files, size


def _packed(base: Checkpoint, form: Form | None) -> tuple[QuantizedCheckpoint, Form]:
    """A base that is known to be quantized, and the form that goes with it."""
    assert isinstance(base, QuantizedCheckpoint)
    assert form is not None
    return base, form


def _check_result(merging: Merging, options: BakeOptions, form: Form | None) -> None:
    """Refuse a result that differs in nothing, or that lost most of an update by quantizing it."""
    if options.require_change:
        _check_change(merging)
    if form == "same" and not options.force:
        base, _ = _packed(merging.base, form)
        with one_thread():
            rows = merging.rows()
        own = [p for p in merging.targets if p.target.target.name in base.packed]
        found = [rows[id(p.adapter), p.key] for p in own]
        if low := [r for r in found if not r.dead and r.kept < _LEAST]:
            raise QuantizationLossError([(r.target, r.kept) for r in low], len(found))


def _check_change(merging: Merging) -> None:
    """Enabled targets of a weight that is not 0, and yet nothing differs from the base."""
    with one_thread():
        rows = merging.rows()
    meant = [rows[id(p.adapter), p.key] for p in merging.targets if p.weight]
    if meant and not any(row.changed for row in rows.values()):
        raise UnchangedError(
            dict.fromkeys(p.adapter.source for p in merging.targets),
            len(meant),
            lost=any(row.lost for row in meant),
        )


def _notes(
    checkpoint: Checkpoint, rows: Sequence[BakedTarget], form: Form | None, options: BakeOptions
) -> list[str]:
    notes = []
    if form == "dense" and isinstance(checkpoint, SafetensorsCheckpoint):
        notes.append(
            "The weights are no longer quantized: a config.json for them must not say they are."
        )
    if options.original is not None and (said := advice(rows, checkpoint.path, options.original)):
        notes.append(said)
    if not rows:
        notes.append("No target is enabled: the result holds the base's weights.")
    elif not any(row.changed for row in rows):
        notes.append("No element changed: the result holds the base's weights.")
    if any(row.measured < row.total for row in rows):
        notes.append(
            "Norms and rounding loss are estimated from every eighth block of rows; "
            "--verify measures all of them."
        )
    if lost := [row.target for row in rows if row.lost]:
        notes.append(f"Too small for the stored dtype to hold: the update of {', '.join(lost)}.")
    if isinstance(checkpoint, DirectoryCheckpoint):
        ends = (".safetensors", *_PICKLES)
        others = sorted(
            p.name
            for p in checkpoint.path.iterdir()
            if p.name.endswith(ends) and p.name not in checkpoint.parts and rows
        )
        notes += [
            f"{name} was copied as it is: baked was {', '.join(checkpoint.parts)}."
            for name in others
        ]
    return notes
