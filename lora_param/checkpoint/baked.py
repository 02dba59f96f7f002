"""What a bake did, and what its caller should know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.measures import BakedTarget
from lora_param.checkpoint.options import BakeOptions
from lora_param.checkpoint.original import advice
from lora_param.checkpoint.pickle import SUFFIXES
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.checkpoint.unpacking import Form
from lora_param.printing import Printed

__all__ = ["BakeReport", "notes_of"]


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


def notes_of(
    checkpoint: Checkpoint, rows: Sequence[BakedTarget], form: Form | None, options: BakeOptions
) -> list[str]:
    """What the rows, the place and the options call for: one sentence each."""
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
        ends = (".safetensors", *SUFFIXES)
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
