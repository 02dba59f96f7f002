"""What there is to say about weights and targets: rows and totals, as text, data or a page.

Needs neither torch nor numpy, nor, until it is printed, Rich.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from lora_param.printing import Drawn
from lora_param.report import figures

__all__ = ["Stats", "TargetRow", "WeightRow"]


@dataclass(frozen=True)
class TargetRow:
    """One target of one adapter.

    Attributes:
        target: its key, the weight's full name with its slice.
        shape: shape of the whole weight.
        dtype: the weight's dtype, by torch's name.
        adapter: name of the adapter.
        rank: rows of A and columns of B.
        alpha: the strength it was given.
        scale: what multiplies B @ A.
        enabled: the update takes part in the weight.
        trainable: number of elements of its factors.
        dead: still zero: B is all zero, or the factors are missing.
        update_norm: ‖ΔW‖, where it was measured; of DoRA without its base, ‖scale·(B @ A)‖.
        weight_norm: ‖W‖ of the adapted part, where it was measured.
        effective_rank: of ΔW, where it was measured.
        also: further names of the same (tied) tensor that share the factors.
        singular_values: of ΔW, greatest first, where they were measured; of a stack each is the
            root of the sum of squares over its matrices. Their norm is `update_norm`. Of DoRA,
            whose ΔW is of full rank, they and the effective rank are those of scale·(B @ A).
        variant: its name.
    """

    target: str
    shape: tuple[int, ...]
    dtype: str
    adapter: str
    rank: int
    alpha: float
    scale: float
    enabled: bool
    trainable: int
    dead: bool
    update_norm: float | None = None
    weight_norm: float | None = None
    effective_rank: float | None = None
    also: tuple[str, ...] = ()
    singular_values: tuple[float, ...] | None = None
    variant: str = "lora"

    @property
    def ratio(self) -> float | None:
        """‖ΔW‖/‖W‖, where both were measured; infinite for an update of a zero weight."""
        if self.update_norm is None or self.weight_norm is None:
            return None
        if self.weight_norm == 0:
            return 0.0 if self.update_norm == 0 else math.inf
        return self.update_norm / self.weight_norm

    @property
    def finite(self) -> bool:
        """No norm that was measured is NaN or infinite."""
        norms = (self.update_norm, self.weight_norm)
        return all(v is None or math.isfinite(v) for v in norms)

    @property
    def words(self) -> tuple[str, ...]:
        """What is out of the ordinary, in words: "disabled", "still zero", "not finite"."""
        found = []
        if not self.enabled:
            found.append("disabled")
        if self.dead:
            found.append("still zero")
        if not self.finite:
            found.append("not finite")
        return tuple(found)

    def to_dict(self, *, singular_values: bool = False) -> dict[str, object]:
        """The row as plain data for JSON, which has no NaN: such a number is null.

        Args:
            singular_values: with them; they are most of the numbers, and wanted by few.
        """
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in {
                **asdict(self),
                "shape": list(self.shape),
                "also": list(self.also),
                "ratio": self.ratio,
                "finite": self.finite,
            }.items()
        }
        del row["singular_values"]
        if singular_values:
            known = self.singular_values
            finite = known is not None and all(math.isfinite(v) for v in known)
            row["singular_values"] = list(known) if known is not None and finite else None
        return row


@dataclass(frozen=True)
class WeightRow:
    """One weight of a model or a checkpoint.

    Attributes:
        name: its full name.
        shape: its shape.
        dtype: its dtype, by torch's name.
        elements: how many it has.
        adapted: keys of the targets on it.
        quantized: the format that stores it, "" where it is stored as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    adapted: tuple[str, ...] = ()
    quantized: str = ""

    def to_dict(self) -> dict[str, object]:
        """The row as plain data, for JSON."""
        return {**asdict(self), "shape": list(self.shape), "adapted": list(self.adapted)}


@dataclass(frozen=True)
class Stats(Drawn):
    """What is in a model, an adapter, or both, as text, as data and as a page.

    It prints itself; `to_dict` gives plain data, `to_html` and `write_html` a page.

    Attributes:
        rows: one for each target of each adapter.
        base: number of elements of all base weights; 0 where the base is not at hand.
        weights: one for each weight; empty where the base is not at hand.
        source: what it is about, to show above.
        notes: sentences to show below.
        unfrozen: number of base elements that train as well, besides the factors.
        name: what the base is called, or the adapter where it is alone.

    Example:
        >>> row = TargetRow("fc.weight", (10, 20), "float32", "default", 1, 1, 1, True, 30, True)
        >>> stats = Stats((row,), base=210)
        >>> stats.trainable, round(stats.percent, 2), len(stats.dead)
        (30, 14.29, 1)
    """

    rows: tuple[TargetRow, ...] = ()
    base: int = 0
    weights: tuple[WeightRow, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    unfrozen: int = 0
    name: str = ""
    view: ClassVar[str] = "stats_view"
    page: ClassVar[tuple[str, str]] = ("document", "page")

    @property
    def trainable(self) -> int:
        """Number of elements of all factors."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """Number of elements of the base weights and the factors together."""
        return self.base + self.trainable

    @property
    def percent(self) -> float:
        """Elements of the factors, in percent of the base weights; 0 where the base is unknown."""
        return 100 * self.trainable / self.base if self.base else 0.0

    @property
    def dead(self) -> tuple[TargetRow, ...]:
        """The targets that are still zero."""
        return tuple(row for row in self.rows if row.dead)

    @property
    def disabled(self) -> tuple[TargetRow, ...]:
        """The targets that are disabled."""
        return tuple(row for row in self.rows if not row.enabled)

    def to_dict(self, *, singular_values: bool = False) -> dict[str, object]:
        """All of it as plain data, for JSON; with every target's singular values if asked."""
        return {
            "source": self.source,
            "trainable": self.trainable,
            "base": self.base,
            "total": self.total,
            "percent": self.percent,
            "unfrozen": self.unfrozen,
            "dead": [row.target for row in self.dead],
            "disabled": [row.target for row in self.disabled],
            "rows": [row.to_dict(singular_values=singular_values) for row in self.rows],
            "weights": [row.to_dict() for row in self.weights],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        parts = [figures.plural(len(self.rows), "target"), f"trainable {self.trainable:,}"]
        if self.base:
            parts[1] += f" of {self.base:,} ({figures.percent(self.percent)})"
        odd = {"still zero": self.dead, "disabled": self.disabled}
        return f"<Stats: {', '.join(parts + [f'{len(v)} {k}' for k, v in odd.items() if v])}>"
