"""Patterns over weights → `Plan`: which weights, with what rank and scale, and why. Pure.

Applying a plan makes no choices of its own: whatever can be refused is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

from lora_param.errors import (
    OptionError,
    OverlapError,
    TargetError,
    TiedWeightsError,
)
from lora_param.printing import Printed
from lora_param.targets.patterns import parse_patterns
from lora_param.targets.regions import Region, Target
from lora_param.targets.selection import PatternCount, Selection
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight, count_base, weights_from

__all__ = [
    "TIED",
    "LeftOut",
    "PatternCount",
    "Plan",
    "PlannedTarget",
    "check_tied",
    "make_plan",
]

Tied = Literal["error", "together", "apart"]

TIED = ("error", "together", "apart")


@dataclass(frozen=True)
class PlannedTarget:
    """One target, with all that is needed to create its factors.

    Attributes:
        target: the weight or the part of it.
        weight: what is known of the whole weight.
        settings: rank, alpha and so on.
        pattern: the last pattern that named it.
        also: further names of the same (tied) tensor that share the factors.
        apart: further names of the same tensor that keep the base.
        asked: the rank that was asked for, where it is above min(out, in) and so was capped.
    """

    target: Target
    weight: Weight
    settings: Settings
    pattern: str
    also: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    asked: int | None = None

    @property
    def matrix(self) -> tuple[int, ...]:
        """(out, in), or (E, out, in) for a stack."""
        return self.target.region.matrix(self.weight.shape)

    @property
    def trainable(self) -> int:
        """Number of elements of the factors."""
        return sum(math.prod(shape) for shape in self.settings.shapes(self.matrix).values())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A weight that a pattern named but that is not adapted."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan(Printed):
    """What `apply` would do. Prints itself, as `apply --dry-run` does; `to_dict` gives it as data.

    Attributes:
        targets: in the order of the model's names.
        counts: one for each pattern, in the order given.
        left_out: weights that a broad pattern named but that are not adapted, with the reason.
        base: number of elements of all base weights.
    """

    targets: tuple[PlannedTarget, ...]
    counts: tuple[PatternCount, ...]
    left_out: tuple[LeftOut, ...]
    base: int
    view: ClassVar[str] = "plan_view"

    @property
    def trainable(self) -> int:
        """Number of elements of all factors."""
        return sum(t.trainable for t in self.targets)

    @property
    def percent(self) -> float:
        """Trainable elements, in percent of the base weights."""
        return 100 * self.trainable / self.base if self.base else 0.0

    @property
    def factor_bytes(self) -> int:
        """Size of the factors in fp32, in bytes; AdamW keeps twice as much again."""
        return 4 * self.trainable

    def to_dict(self) -> dict[str, object]:
        """The plan as plain data, for JSON."""
        return {
            "targets": [
                {
                    "target": str(t.target),
                    "shape": list(t.weight.shape),
                    "dtype": t.weight.dtype,
                    "quantized": t.weight.quantized,
                    **asdict(t.settings),
                    "asked": t.asked,
                    "scale": t.settings.scale,
                    "trainable": t.trainable,
                    "pattern": t.pattern,
                    "also": list(t.also),
                    "apart": list(t.apart),
                }
                for t in self.targets
            ],
            "counts": [asdict(c) for c in self.counts],
            "left_out": [asdict(item) for item in self.left_out],
            "base": self.base,
            "trainable": self.trainable,
            "percent": self.percent,
            "factor_bytes": self.factor_bytes,
        }

    def __repr__(self) -> str:
        share = f"trainable {self.trainable:,} of {self.base:,} ({self.percent:.2f} %)"
        return f"<Plan: {len(self.targets)} targets, {share}>"


def check_tied(tied: str) -> None:
    """Refuse what `make_plan` does not take as `tied`.

    Raises:
        OptionError: it is none of the accepted ones.
    """
    if tied not in TIED:
        raise OptionError("tied", tied, ", ".join(TIED))


def make_plan(
    weights: Mapping[str, Sequence[int] | Weight],
    targets: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    settings: Settings | None = None,
    tied: Tied = "error",
    buffers: Iterable[Weight] = (),
) -> Plan:
    """Choose the targets among `weights`.

    A rank above min(out, in) of a target's matrix is capped there, and its scale kept.

    Args:
        weights: names and shapes, or names and `Weight`s.
        targets: patterns; the last one that names a weight decides its settings.
        exclude: patterns that take away, as `!PATTERN` among the targets does.
        settings: for what the patterns do not set.
        tied: what to do about a tensor with several names of which only some are targeted.
        buffers: what else has a name on the model; asked for when a pattern matches no weight.

    Raises:
        TargetError: a pattern that cannot be read or matches nothing, a weight that cannot be
            adapted, a slice that does not fit, overlapping targets, one side of a tie.
        OptionError: a setting outside its accepted values.
    """
    check_tied(tied)
    weights = weights_from(weights)
    patterns, excluded = parse_patterns(targets), parse_patterns(exclude, "exclude")
    if not any(not p.negated for p in patterns):
        raise OptionError("targets", [p.text for p in patterns], "at least one pattern without '!'")

    selection = Selection(weights, buffers)
    base = settings or Settings()
    counts = [selection.add(p, base) for p in patterns if not p.negated]
    counts += [selection.take_away(p, p.text) for p in patterns if p.negated]
    counts += [selection.take_away(p, f"!{p.text.removeprefix('!')}") for p in excluded]
    if not selection.chosen:
        raise TargetError("nothing is left to adapt: the patterns take away all that they match.")

    order = {name: i for i, name in enumerate(weights)}
    planned = [
        _planned(target, weights[target.name], *chosen)
        for target, chosen in sorted(
            selection.chosen.items(), key=lambda item: (order[item[0].name], str(item[0]))
        )
    ]
    _check_overlaps(planned)
    planned = _join_tied(planned, tied)
    adapted = {t.target.name for t in planned}
    left_out = tuple(LeftOut(n, r) for n, r in selection.left_out.items() if n not in adapted)
    return Plan(tuple(planned), tuple(counts), left_out, count_base(weights))


def _planned(target: Target, weight: Weight, asked: Settings, pattern: str) -> PlannedTarget:
    settings = asked.on_part(target.region, weight.shape)
    rank = asked.rank if settings.rank != asked.rank else None
    return PlannedTarget(target, weight, settings, pattern, asked=rank)


def _check_overlaps(planned: Sequence[PlannedTarget]) -> None:
    regions: dict[str, list[Region]] = {}
    for t in planned:
        for other in regions.setdefault(t.target.name, []):
            if t.target.region.overlaps(other):
                raise OverlapError(str(Target(t.target.name, other)), str(t.target))
        regions[t.target.name].append(t.target.region)


def _join_tied(planned: Sequence[PlannedTarget], tied: Tied) -> list[PlannedTarget]:
    """One target for each tied tensor that is adapted under all its names."""
    chosen = {t.target for t in planned}
    joined: list[PlannedTarget] = []
    absorbed: set[Target] = set()
    for t in planned:
        if t.target in absorbed:
            continue
        region, names = t.target.region, t.weight.tied
        also = tuple(n for n in names if Target(n, region) in chosen)
        rest = tuple(n for n in names if n not in also)
        if rest and tied == "error":
            raise TiedWeightsError([str(t.target), *also], rest)
        if rest and tied == "together":
            also, rest = names, ()
        absorbed.update(Target(n, region) for n in also)
        joined.append(replace(t, also=also, apart=rest))
    return joined
