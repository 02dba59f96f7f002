"""What there is to say about weights, targets and checks, as plain data: neither torch nor Rich.

`rows.Stats` is this data with the ability to print itself; what prints it imports this file alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

__all__ = ["Check", "StatsData", "TargetRow", "WeightRow"]


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
        variant: lora or dora.
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
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    adapted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The row as plain data, for JSON."""
        return {**asdict(self), "shape": list(self.shape), "adapted": list(self.adapted)}


@dataclass(frozen=True)
class StatsData:
    """What is in a model, an adapter, or both.

    Attributes:
        rows: one for each target of each adapter.
        base: number of elements of all base weights; 0 where the base is not at hand.
        weights: one for each weight; empty where the base is not at hand.
        source: what it is about, to show above.
        notes: sentences to show below.
        unfrozen: number of base elements that train as well, besides the factors.
    """

    rows: tuple[TargetRow, ...] = ()
    base: int = 0
    weights: tuple[WeightRow, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    unfrozen: int = 0

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


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: "share", "frozen", "gradients", "loss", "unchanged" or "disabled".
        found: what was seen, in words.
        expected: what should have been.
        passed: they agree.
        failed: name of what failed → why, where it can be named.
    """

    name: str
    found: str
    expected: str
    passed: bool
    failed: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """The check as plain data, for JSON."""
        return {
            "name": self.name,
            "found": self.found,
            "expected": self.expected,
            "passed": self.passed,
            "failed": dict(self.failed),
        }
