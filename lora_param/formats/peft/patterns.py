"""Names and numbers in the config: the common value, and patterns for what differs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_param.errors import BrokenFileError
from lora_param.targets.weights import Weight

__all__ = ["chosen_modules", "exact_alpha", "patterns", "target_names"]

T = TypeVar("T")

_KEPT_WITH_BASE = ("embed_tokens", "lm_head")  # PEFT also saves W of what is targeted by these


def exact_alpha(scale: float, rank: int) -> float:
    """The alpha for which alpha/rank is `scale` to the last bit, where there is one.

    >>> exact_alpha(1.5, 4)
    6.0
    """
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scale), alpha)


def patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and for each other name a pattern that PEFT matches to it alone.

    PEFT takes the first pattern that matches an end of the name, and sorts them when it saves.

    >>> patterns({"a.q": 2, "a.v": 2, "b.v": 4})
    (2, {'b.v': 4})
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != common}
    if _reads_as(others, values, common):
        return common, others
    return common, {f"^{re.escape(name)}": value for name, value in others.items()}


def _reads_as(found: Mapping[str, T], values: Mapping[str, T], common: T) -> bool:
    if len(found) * len(values) > 200_000:  # quadratic, and both forms are right where names differ
        return False
    ordered = sorted(found)
    for name, value in values.items():
        key = next((k for k in ordered if re.match(rf"(.*\.)?({k})$", name)), None)
        if (common if key is None else found[key]) != value:
            return False
    return True


def target_names(weights: Mapping[str, Weight], modules: Sequence[str]) -> list[str]:
    """What `target_modules` has to list: last names, where they name these modules alone."""
    leaves = sorted({m.rpartition(".")[2] for m in modules})
    every = {n.rpartition(".")[0] for n in weights}
    named = {m for m in every if m.rpartition(".")[2] in leaves}
    if weights and named == set(modules) and not set(leaves) & set(_KEPT_WITH_BASE):
        return leaves
    return sorted(modules)


def chosen_modules(raw: Mapping[str, Any], path: Path) -> dict[str, str | list[str]]:
    """`target_modules` and `exclude_modules` of a config.

    Raises:
        BrokenFileError: they are neither names nor an expression.
    """
    found: dict[str, str | list[str]] = {}
    for name in ("target_modules", "exclude_modules"):
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise BrokenFileError(path, f"{name} is no expression ({error})") from None
        elif not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise BrokenFileError(path, f"{name} is {value!r:.80}")
        found[name] = value
    return found
