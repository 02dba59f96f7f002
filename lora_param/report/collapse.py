"""Repeated layers in one line: `layer.0.query`, `layer.1.query`, … → `layer.{0..5}.query`.

The collapsed name is itself a pattern of the target language and names the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, TypeVar

__all__ = ["Group", "collapse", "is_index"]

T = TypeVar("T")
Axes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group(Generic[T]):
    """Items that differ by nothing shown but the indices in their names.

    Attributes:
        segments: the dotted segments of the common name, the indices of each as `{0..5}`.
        items: in the order they were given.
    """

    segments: tuple[str, ...]
    items: tuple[T, ...]

    @property
    def name(self) -> str:
        """The common name."""
        return ".".join(self.segments)


def collapse(
    items: Iterable[T], name: Callable[[T], str], alike: Callable[[T], Hashable]
) -> list[Group[T]]:
    """Join items whose names differ in whole numeric segments alone, in order of appearance.

    Args:
        items: what is to be listed.
        name: the dotted name of an item, with its slice.
        alike: what is shown of an item; only items with equal values are joined.

    >>> names = [f"layer.{i}.{p}" for i in range(3) for p in "qv"]
    >>> [(g.name, len(g.items)) for g in collapse(names, str, lambda _: 0)]
    [('layer.{0..2}.q', 3), ('layer.{0..2}.v', 3)]
    """
    families: dict[Hashable, dict[tuple[int, ...], list[tuple[int, T]]]] = {}
    for position, item in enumerate(items):
        segments = name(item).split(".")
        template = tuple(None if is_index(s) else s for s in segments)
        indices = tuple(int(s) for s in segments if is_index(s))
        members = families.setdefault((template, alike(item)), {})
        members.setdefault(indices, []).append((position, item))
    groups: list[tuple[int, Group[T]]] = []
    for (template, _), members in families.items():  # type: ignore[misc]
        for box in _boxes(list(members)):
            inside = sorted(
                (pair for point in members if _within(point, box) for pair in members[point]),
                key=lambda pair: pair[0],
            )
            texts = iter([_braces(axis) for axis in box])
            named = tuple(next(texts) if s is None else s for s in template)
            groups.append((inside[0][0], Group(named, tuple(item for _, item in inside))))
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]


def is_index(segment: str) -> bool:
    """The segment of a name is a whole number, as in `layer.11.query`."""
    # "01" is left as it is: {0..1} would not bring its zero back
    return segment.isascii() and segment.isdigit() and (segment == "0" or segment[0] != "0")


def _within(point: Sequence[int], box: Axes) -> bool:
    return all(index in axis for index, axis in zip(point, box, strict=True))


def _boxes(points: Sequence[tuple[int, ...]]) -> list[Axes]:
    """Cover points by products of index sets, each point once."""
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*points, strict=True))
    if prod(len(axis) for axis in axes) == len(points):
        return [axes]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *tail in sorted(points):
        tails.setdefault(first, []).append(tuple(tail))
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest in tails.items():
        firsts.setdefault(tuple(rest), []).append(first)
    return [(tuple(f), *box) for rest, f in firsts.items() for box in _boxes(rest)]


def _braces(indices: Sequence[int]) -> str:
    """Indices as the target language writes them: `4`, `{0..5}`, `{0,2..4}`."""
    if len(indices) == 1:
        return str(indices[0])
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [
        f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(str(i) for i in run) for run in runs
    ]
    return "{" + ",".join(parts) + "}"
