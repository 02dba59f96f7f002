"""What `diff` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from lora_param.printing import Drawn

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
class Diff(Drawn):
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
    page: ClassVar[tuple[str, str]] = ("compared", "compared_page")

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

    def __repr__(self) -> str:
        found = "the same" if self.same else f"{len(self.rows)} differ"
        return f"<Diff of {self.kind}: {found} of {self.compared}>"
