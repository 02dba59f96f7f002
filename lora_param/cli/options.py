"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_param.errors import OptionError

__all__ = [
    "MODEL",
    "AdapterFile",
    "Alpha",
    "AnyBase",
    "Force",
    "Html",
    "Json",
    "Key",
    "Layout",
    "Model",
    "Names",
]
__all__ += ["NoSync", "Targets", "switches", "weighted"]

MODEL = (
    "A .safetensors, .gguf, .pt, .pth, .bin or .ckpt file, a directory of them or a distributed "
    "checkpoint, hf://owner/name or another URL of one, or python:package.module:callable."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
AdapterFile = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="An adapter file.", show_default=False)
]
Targets = Annotated[
    list[str] | None,
    typer.Option("-t", "--target", metavar="PATTERN", help="Weights to choose; may be repeated."),
]
Key = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which nested state dict of a pickled checkpoint."),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar="out-in|in-out", help="How square weights are stored, where nothing tells it."
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(metavar="X", help="What it was trained with, of a file that does not say it."),
]
Names = Annotated[
    Path | None,
    typer.Option("--names", metavar="FILE", help="Further rules between names, one line each."),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="PAGE", help="Also write it as one HTML page."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Do not wait for the disk: faster.")]
AnyBase = Annotated[
    bool,
    typer.Option("--ignore-fingerprint", help="Accept a base with other values or dtypes."),
]


def switches(text: str) -> tuple[bool, ...]:
    """`1,0,1`: on, off, on."""
    parts = [part.strip() for part in text.split(",")]
    if not set(parts) <= {"0", "1"}:
        raise OptionError("enable_lora", text, "0 or 1 for each block of rows, as in 1,0,1")
    return tuple(part == "1" for part in parts)


def weighted(text: str) -> tuple[str, float]:
    """`ADAPTER=WEIGHT`; a name with an equals sign in it stays whole if such a file exists."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        if not Path(path).exists():  # an adapter whose name has an equals sign in it
            return text, 1.0
        raise OptionError(f"the weight of {path}", weight, "a number, as in ADAPTER=0.5") from None
