"""Patterns over what exists already: the nearest names, and the targets of an adapter."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from lora_param.errors import NoMatchError
from lora_param.targets.patterns import Pattern, parse_patterns
from lora_param.targets.weights import Weight

__all__ = ["match_targets", "nearest_names"]


def nearest_names(pattern: Pattern, weights: Mapping[str, Weight], limit: int = 3) -> list[str]:
    """Names, or ends of names, that the pattern's writer may have meant."""
    if pattern.kind == "type":
        classes = {c for w in weights.values() for c in w.classes}
        return difflib.get_close_matches(pattern.type_name, sorted(classes), limit, 0.4)
    body = pattern.text.removeprefix("!").removeprefix("re:")
    ends: dict[str, None] = {}
    for weight in weights.values():
        if weight.unsuitable:
            continue
        parts = weight.name.removesuffix(".weight").split(".")
        ends.update((".".join(parts[i:]), None) for i in range(len(parts)))
    nearest = difflib.get_close_matches(body, list(ends), limit, 0.5)
    return nearest or [name for name, w in weights.items() if not w.unsuitable][:limit]


def match_targets(keys: Mapping[str, Weight], patterns: str | Iterable[str] | None) -> list[str]:
    """The keys of existing targets that the patterns name; all of them for None.

    Args:
        keys: target keys (with their slices) and their weights.
        patterns: as in `make_plan`, without settings. A pattern without a slice names every
            target on its weight.

    Raises:
        TargetError: a pattern cannot be read or matches none of the targets.
    """
    if patterns is None:
        return list(keys)
    named: set[str] = set()
    away: set[str] = set()
    for pattern in parse_patterns(patterns):
        hit = {
            key
            for key, weight in keys.items()
            if pattern.matches(weight)
            and (
                pattern.part is None
                or key == f"{weight.name}{pattern.part.resolve(weight.name, weight.shape)}"
            )
        }
        if not hit:
            weights = {w.name: w for w in keys.values()}
            raise NoMatchError(pattern.text, nearest_names(pattern, weights), len(keys))
        (away if pattern.negated else named).update(hit)
    chosen = (named or set(keys)) - away
    return [key for key in keys if key in chosen]
