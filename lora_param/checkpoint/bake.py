"""Baking: W + ΔW written where W stood, in a checkpoint of the same names, shapes and files.

Everything is read and checked first, the output is built beside its place, and only then takes
it: an error, a full disk or a killed process leaves what was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from lora_param.adapter import Adapter
from lora_param.checkpoint.baked import BakeReport, notes_of
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.chunks import write_distributed
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.module import ModuleCheckpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.options import BakeOptions, PathText, parse_dtype, parse_size
from lora_param.checkpoint.original import quantization_errors
from lora_param.checkpoint.output import (
    Progress,
    write_directory,
    write_file,
    write_state_dict,
)
from lora_param.checkpoint.places import (
    check_place,
    has_shards,
    held,
    is_directory,
    place_of,
    stored_in,
)
from lora_param.checkpoint.plan import plan_merging
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint
from lora_param.checkpoint.reread import (
    verify_directory,
    verify_distributed,
    verify_file,
    verify_quantized,
)
from lora_param.checkpoint.resuming import JOURNAL, Leftovers, mark_of
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.checkpoint.unpacking import (
    Form,
    check_files,
    check_form,
    write_quantized_directory,
    write_quantized_file,
)
from lora_param.errors import OptionError, QuantizationLossError, UnchangedError, worded
from lora_param.files.journal import Journal
from lora_param.files.locks import State
from lora_param.files.placed import open_placed
from lora_param.files.writer import RESULT, replace_in_steps
from lora_param.weight.blocks import one_thread

__all__ = ["bake_adapters"]

_LEAST = 0.5  # of an update that has to be left of it where it is quantized


def bake_adapters(
    base: PathText,
    adapters: Sequence[tuple[Adapter, float]],
    out: PathText | None,
    options: BakeOptions,
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
        held(base) if options.in_place else nullcontext() as state,
        closing(open_checkpoint(base, options.key)) as checkpoint,
        nullcontext()
        if options.original is None
        else open_checkpoint(options.original) as original,
    ):
        place = place_of(checkpoint, base, out, options.in_place)
        if isinstance(checkpoint, QuantizedCheckpoint):
            check_files(checkpoint, place)
        check_place(stored_in(checkpoint), adapters, place, options)
        if limit is not None and not has_shards(checkpoint):
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
        merging.casts_vectors = not isinstance(stored_in(checkpoint), GgufCheckpoint)
        if isinstance(checkpoint, QuantizedCheckpoint) and form is not None:
            check_form(merging, checkpoint, form)
            if original is not None:
                errors = quantization_errors(merging, checkpoint, original)
                merging.exact = True
        files, size, told = _write(merging, place, options, state, form)
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
                *told,
                *notes_of(stored_in(checkpoint), rows, form, options),
                *(n for a in merging.adapters for n in a.notes),
            ),
            (form or "") if getattr(checkpoint, "packed", None) else "",
        )


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


def _write(
    merging: Merging,
    place: Path,
    options: BakeOptions,
    replaces: State | None,
    form: Form | None,
) -> tuple[list[str], int, list[str]]:
    """Write the result; its files' names, their size together, and notes."""
    base, progress = merging.base, options.progress
    force, sync = options.force or options.in_place, options.sync
    done, total = 0, base.nbytes * (2 if options.verify else 1)

    def tick(count: int, name: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, name)

    live, directory = isinstance(base, ModuleCheckpoint), is_directory(stored_in(base))
    left = Leftovers("" if live else mark_of(merging, options, form))
    with replace_in_steps(
        place,
        directory=directory,
        force=force,
        sync=sync,
        replaces=replaces,
        resumes=left.fits if options.resume and not live else None,
    ) as temporary:
        out = temporary / RESULT
        with nullcontext() if live else closing(Journal(temporary / JOURNAL, left.mark)) as journal:
            merging.journal = journal
            if directory:
                files = _write_directory(merging, out, form, tick)
            else:
                files = _write_file(merging, out, place, form, tick)
        _check_result(merging, options, form)
        size = sum(p.stat().st_size for p in (out, *out.rglob("*")) if p.is_file())
        if options.verify and form is not None:
            verify_quantized(merging, *_packed(base, form), out, tick)
        elif options.verify and isinstance(base, DistributedCheckpoint):
            verify_distributed(merging, base, out, tick)
        elif options.verify and isinstance(base, DirectoryCheckpoint):
            verify_directory(merging, base, out, tick)
        elif options.verify:
            verify_file(merging, base, out, tick, place)
    if progress is not None:
        progress(total, total, place.name)  # a smaller dtype writes less than was announced
    return files, size, [left.note(merging.resumed, size)] if options.resume else []


def _write_directory(merging: Merging, out: Path, form: Form | None, tick: Progress) -> list[str]:
    """Write a directory; the names of its files."""
    out.mkdir(exist_ok=True)
    if isinstance(merging.base, DirectoryCheckpoint):
        return write_directory(merging, merging.base, out, tick)
    if isinstance(merging.base, DistributedCheckpoint):
        return write_distributed(merging, merging.base, out, tick)
    return write_quantized_directory(merging, *_packed(merging.base, form), out, tick)


def _write_file(
    merging: Merging, out: Path, place: Path, form: Form | None, tick: Progress
) -> list[str]:
    """Write a file; its name."""
    base = merging.base
    with open_placed(out) as file:
        if isinstance(base, ModuleCheckpoint):
            write_state_dict(merging, base.state_dict, place, file, tick)
        elif form is not None:
            write_quantized_file(merging, *_packed(base, form), file, tick)
        else:
            write_file(merging, base, file, tick)
    return [place.name]


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
