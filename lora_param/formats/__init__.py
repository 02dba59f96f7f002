"""Adapters on disk: the registry of formats, and what reads and writes any of them.

A new format is one new file and one line in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_param.adapter import Adapter
from lora_param.errors import MissingFileError, NoFormError, OptionError
from lora_param.files.places import place, writable
from lora_param.formats import (
    diffusers,
    gguf,
    kohya,
    loralib,
    lycoris,
    minlora,
    mlx,
    native,
    peft,
    portable,
    torchtune,
)
from lora_param.formats.base import LAYOUTS, Format
from lora_param.formats.native import check_adapter_name
from lora_param.formats.unknown import ACCEPTED, unknown_adapter
from lora_param.names.table import read_names

__all__ = [
    "FORMATS",
    "check_adapter_name",
    "format_named",
    "format_of",
    "is_adapter",
    "read_adapter",
    "toggle_file",
    "write_adapter",
]

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        native.FORMAT,
        mlx.FORMAT,  # before peft, whose directories have a file of the same name in them
        diffusers.FORMAT,  # before peft, whose endings its keys have
        peft.FORMAT,
        portable.FORMAT,
        kohya.FORMAT,
        lycoris.FORMAT,
        minlora.FORMAT,
        loralib.FORMAT,
        torchtune.FORMAT,
        gguf.FORMAT,
    )
}
"""Name → format, in the order in which they are tried."""


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """The path holds an adapter in one of the formats.

    Raises:
        BrokenFileError: the file is damaged.
    """
    found = place(path)
    return any(f.recognise(found) for f in FORMATS.values())


def format_of(path: Path) -> Format:
    """The format of what is at a path.

    Raises:
        MissingFileError, BrokenFileError, UnknownFileError: as for `read_adapter`.
    """
    if not path.exists():
        raise MissingFileError(path, ACCEPTED)
    found = next((f for f in FORMATS.values() if f.recognise(path)), None)
    if found is None:
        raise unknown_adapter(path)
    return found


def read_adapter(
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    names: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    """Read an adapter of any format; its tensors are read when they are asked for.

    Args:
        path: an adapter file or directory, of any of `FORMATS`, or a URL of one (see `place`).
        layout: "out-in" or "in-out": how the base stores square weights, for a file that does not
            tell and a base whose classes are unknown.
        names: a file of further rules between the adapter's names and a base's.
        alpha: what it was trained with, for a file that does not say it (loralib, minLoRA,
            torchtune); the scale is alpha/rank.
        enable_lora: as in loralib's MergedLinear: which of its equal blocks of rows are adapted.

    Raises:
        UnsettledError: the file needs an alpha to be told, and none is given.
        OptionError: something is told that the file says itself.
        NameRuleError: `names` cannot be read.
        OptionError: `layout` is neither of the two, or the file tells it.
        MissingFileError: there is nothing at this path.
        BrokenFileError: it is damaged, or its tensors and its settings do not agree.
        UnknownFileError: it is no adapter, or one of a format that is not supported.
        NoFormError: it has something that has no form here.
    """
    if layout not in (None, *LAYOUTS):
        raise OptionError("layout", layout, ", ".join(LAYOUTS))
    path = place(path)
    known = format_of(path)
    told = {"alpha": alpha, "enable_lora": enable_lora}
    given = {name: value for name, value in told.items() if value is not None}
    for name, value in given.items():
        if name not in known.takes:
            raise OptionError(name, value, f"nothing for {path}: {known.name} has no use for it")
    adapter = known.read(path, layout=layout, **given)
    if names is None:
        return adapter
    given_names = read_names(names)
    own = adapter.names
    return replace(adapter, names=given_names if own is None else own.joined(given_names))


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    force: bool = True,
    sync: bool = True,
) -> None:
    """Write an adapter, atomically; equal content gives equal bytes.

    Args:
        adapter: what to write.
        path: where: a file, for PEFT a directory; a symbolic link is followed.
        format: a name of `FORMATS`; "native" by default.
        force: replace an adapter that exists.
        sync: have the data on the disk before the name shows them.

    Raises:
        OptionError: no such format.
        OutputError: the file exists (without force), or cannot be written.
        NoFormError: the adapter has something that has no form in this format.
        UnsettledError: it leaves open what the format has to say; `convert` takes a base.
    """
    chosen = format_named(native.FORMAT.name if format is None else format)
    chosen.write(adapter, writable(path), force=force, sync=sync)


def format_named(name: str) -> Format:
    """One of `FORMATS`.

    Raises:
        OptionError: there is none of this name.
    """
    if name not in FORMATS:
        raise OptionError("format", name, ", ".join(FORMATS))
    return FORMATS[name]


def toggle_file(
    path: str | os.PathLike[str],
    enabled: bool,
    patterns: str | Iterable[str] | None = None,
    *,
    sync: bool = True,
) -> list[str]:
    """Enable or disable targets of an adapter file in place, atomically; factors are untouched.

    Args:
        path: a native adapter file.
        enabled: what the targets become.
        patterns: which targets, in the target language; None for all.
        sync: have the data on the disk before the name shows them.

    Returns:
        The keys of the targets that the patterns name, whether or not they were so before. Where
        all of them were, the file is not written.

    Raises:
        TargetError: a pattern cannot be read or matches none of the targets.
        FileError: as for `read_adapter`; or the file cannot be written.
    """
    path = writable(path)
    if not path.exists() or not native.FORMAT.recognise(path):
        found = format_of(path)
        raise NoFormError(
            str(path),
            f"the format {found.name}",
            "in which targets cannot be switched on and off",
            "convert it first (lora-param convert ADAPTER --to native -o FILE --base MODEL)",
        )
    return native.toggle(path, enabled, patterns, sync=sync)
