"""What `diff` found."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import ClassVar

from lora_param.printing import Printed

__all__ = ["Diff", "Difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One weight or target that is not the same on both sides.

    Attributes:
        name: of the weight, or the target's key.
        what: "values", or in words what cannot be compared: one side alone, shapes, dtypes.
        changed: number of elements that differ.
        total: number of elements.
        norm: ‖a - b‖.
        ratio: ‖a - b‖ / ‖b‖; infinite where b is 0.
        rank: of a - b, where it is a matrix; None for more than 64, and where it was not looked at.
        overlap: of two updates, how much of the smaller one's directions the other spans, from 0
            to 1: the mean of the squared cosines of the principal angles between their column
            spaces and between their row spaces (Hu et al. 2021, §7.2).
    """

    name: str
    what: str = "values"
    changed: int | None = None
    total: int | None = None
    norm: float | None = None
    ratio: float | None = None
    rank: int | None = None
    overlap: float | None = None


@dataclass(frozen=True, repr=False)
class Diff(Printed):
    """What `diff` found. It prints itself.

    Attributes:
        a: one side.
        b: the other: with an adapter, what base and adapter should give.
        kind: "adapters", "checkpoints" or "baked".
        rows: what differs.
        compared: number of weights or targets that both sides have.
        notes: how they were compared, where that is not plain; one sentence each.
    """

    view: ClassVar[str] = "diff_view"

    a: str
    b: str
    kind: str
    rows: tuple[Difference, ...]
    compared: int
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Nothing differs, not one bit."""
        return not self.rows

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "kind": self.kind,
            "same": self.same,
            "compared": self.compared,
            "notes": list(self.notes),
            "differences": [asdict(row) for row in self.rows],
        }

    def to_html(self) -> str:
        """A page with heat maps of layer × projection and all values in a table.

        It needs nothing else, as the page of `Stats`.

        Raises:
            MissingPackageError: Matplotlib is not installed (`pip install 'lora_param[report]'`).
        """
        text: str = import_module("lora_param.report.page.compared").compared_page(self)
        return text

    def write_html(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write what `to_html` gives to a file, atomically.

        Args:
            path: where it goes.
            force: replace a page that exists.

        Raises:
            MissingPackageError: Matplotlib is not installed.
            OutputError: the file exists (without force) or is no page, or cannot be written.
        """
        rendering = import_module("lora_param.report.page.rendering")
        rendering.check_page(path, force=force)
        rendering.write_page(path, self.to_html(), force=force)

    def __repr__(self) -> str:
        found = "the same" if self.same else f"{len(self.rows)} differ"
        return f"<Diff of {self.kind}: {found} of {self.compared}>"
