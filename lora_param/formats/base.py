"""What a format of adapter files is: how to recognise, read and write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_param.adapter import Adapter, Layer

__all__ = ["DORA", "LAYOUTS", "PLAIN", "Format", "Write"]

LAYOUTS = ("out-in", "in-out")
"""How a base may store square weights."""

PLAIN = ("lora", "miss")
"""The variants that are exact products of two factors."""

DORA = (*PLAIN, "dora", "dora_columns")
"""Those, and DoRA over either side of the weight."""


class Write(Protocol):
    """Writes an adapter to a path, atomically."""

    def __call__(self, adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
        """Write it."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what `format=` takes.
        recognise: the path holds an adapter of this format. It raises BrokenFileError for a file
            that is of no format because it is damaged.
        read: reads the adapter at a path that `recognise` has recognised; its tensors are read when
            they are asked for. It takes `layout` (one of `LAYOUTS`: how square weights are stored,
            where nothing tells) and what `takes` names, as keywords. What the file leaves
            open, the adapter's `settle` settles for a base.
        write: see `Write`. What the format needs to know of the base is in the adapter's
            `weights_at_hand`.
        layers: the kinds of layer that it has factors for; None where what has none is for `write`
            to say alone.
        exact: the variants that it has a form for, where it has `layers`.
        takes: what its files leave open and `read` may be told beside the layout: "alpha",
            "enable_lora".
        unsaid: what a file of this adapter does not say, to be told to whoever wrote it, or "".
    """

    name: str
    recognise: Callable[[Path], bool]
    read: Callable[..., Adapter]
    write: Write
    layers: tuple[Layer, ...] | None = None
    exact: tuple[str, ...] = PLAIN
    takes: tuple[str, ...] = ()
    unsaid: Callable[[Adapter], str] = lambda _: ""
