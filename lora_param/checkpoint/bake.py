"""Baking: W + ΔW written where W stood, in a checkpoint of the same names, shapes and files.

Everything is read and checked first, the output is built beside its place, and only then takes
it: an error, a full disk or a killed process leaves what was there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from lora_param.adapter import Adapter
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.chunks import write_distributed
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.measures import BakedTarget
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.module import ModuleCheckpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.options import BakeOptions, Path_, parse_dtype, parse_size
from lora_param.checkpoint.original import advice, quantization_errors
from lora_param.checkpoint.output import write_directory, write_file, write_state_dict
from lora_param.checkpoint.place import DIRECTORIES, PICKLES, check_place, place_of
from lora_param.checkpoint.plan import plan_merging
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint
from lora_param.checkpoint.report import BakeReport
from lora_param.checkpoint.reread import (
    verify_directory,
    verify_distributed,
    verify_file,
    verify_quantized,
)
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.checkpoint.unpacking import (
    Form,
    check_form,
    write_quantized_directory,
    write_quantized_file,
)
from lora_param.errors import (
    OptionError,
    QuantizationLossError,
    UnchangedError,
    worded,
)
from lora_param.files.locks import State, locked
from lora_param.files.writer import replace_directory, replace_file
from lora_param.weight.blocks import one_thread

__all__ = ["bake_adapters"]

_DEFAULT = BakeOptions()
_LEAST = 0.5  # of an update that has to be left of it where it is quantized


def bake_adapters(
    base: Path_,
    adapters: Sequence[tuple[Adapter, float]],
    out: Path_ | None = None,
    options: BakeOptions = _DEFAULT,
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
    with (
        _held(base) if options.in_place else nullcontext() as state,
        closing(open_checkpoint(base, options.key)) as checkpoint,
        nullcontext()
        if options.original is None
        else open_checkpoint(options.original) as original,
    ):
        place = place_of(checkpoint, base, out, options.in_place)
        check_place(_stored(checkpoint), adapters, place, options)
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
    given = (("quantized", "--as", options.quantized), ("original", "--original", options.original))
    for name, flag, value in given:
        if value is not None:
            raise OptionError(worded(name, flag), str(value), "none: the base is not quantized")
    return None


def _held(base: Path_) -> AbstractContextManager[State | None]:
    """The lock of what is read and replaced in place: a second bake of it waits for the first."""
    path = Path(base)
    return locked(path.parent if path.name.endswith(".index.json") else path)


def _has_shards(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, DirectoryCheckpoint) and all(
        isinstance(part, SafetensorsCheckpoint) for part in checkpoint.parts.values()
    )


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

    if isinstance(_stored(base), DIRECTORIES):
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
        ends = (".safetensors", *PICKLES)
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
