"""What a list of patterns chooses among weights, and why it chooses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_param.errors import (
    NoMatchError,
    NoneSuitableError,
    TargetError,
    UnsuitableWeightError,
)
from lora_param.targets.matching import nearest_names
from lora_param.targets.patterns import Pattern
from lora_param.targets.regions import WHOLE, Target
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight

__all__ = ["PatternCount", "Selection"]


@dataclass(frozen=True, slots=True)
class PatternCount:
    """How often a pattern matched."""

    pattern: str
    matched: int
    left_out: int = 0


@dataclass
class Selection:
    """What the patterns have chosen so far.

    Attributes:
        weights: to choose from.
        buffers: what else has a name; asked for when a pattern matches no weight.
        chosen: target → its settings, and the last pattern that named it.
        left_out: name → reason, of weights that a broad pattern named.
    """

    weights: Mapping[str, Weight]
    buffers: Iterable[Weight] = ()
    chosen: dict[Target, tuple[Settings, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, pattern: Pattern, base: Settings) -> PatternCount:
        """Take what the pattern matches; the last pattern that names a weight decides."""
        settings = replace(base, **pattern.settings)  # type: ignore[arg-type]
        matched = left_out = 0
        for weight in self.weights.values():
            if not pattern.matches(weight):
                if pattern.kind == "all-linear" and (reason := weight.not_all_linear):
                    self.left_out[weight.name] = reason
                    left_out += 1
                continue
            if weight.unsuitable:
                if pattern.is_explicit:
                    raise UnsuitableWeightError(weight.name, weight.unsuitable)
                self.left_out[weight.name] = weight.unsuitable
                left_out += 1
                continue
            region = pattern.part.resolve(weight.name, weight.shape) if pattern.part else WHOLE
            self.chosen[Target(weight.name, region)] = (settings, pattern.text)
            matched += 1
        if not matched:
            raise self.nothing(pattern)
        return PatternCount(pattern.text, matched, left_out)

    def take_away(self, pattern: Pattern, text: str) -> PatternCount:
        """Drop what the pattern matches: the whole weight, or just the part it names."""
        named = [w for w in self.weights.values() if pattern.matches(w)]
        if not named:
            raise self.nothing(pattern)
        gone = [
            target
            for target in self.chosen
            for weight in named
            if target.name == weight.name
            and (
                pattern.part is None
                or target.region == pattern.part.resolve(weight.name, weight.shape)
            )
        ]
        for target in gone:
            del self.chosen[target]
        return PatternCount(text, len(gone))

    def nothing(self, pattern: Pattern) -> TargetError:
        """The error for a pattern that matches nothing: why, or the nearest names."""
        if pattern.kind == "type" and not any(w.classes for w in self.weights.values()):
            return TargetError(
                f"{pattern.text!r} needs a live model: a file does not say which class a weight "
                f"belongs to. Name the weights, or give the model as python:MODULE:CALLABLE."
            )
        reasons: dict[str, list[str]] = {}
        for weight in self.weights.values():
            if covered := pattern.covers(weight):
                reasons.setdefault(covered, []).append(weight.name)
        nearest = nearest_names(pattern, self.weights)
        if reasons:
            return NoneSuitableError(pattern.text, reasons, nearest)
        for buffer in self.buffers:
            if pattern.matches(buffer):
                return UnsuitableWeightError(buffer.name, "a buffer and not a parameter")
        return NoMatchError(pattern.text, nearest, len(self.weights))
